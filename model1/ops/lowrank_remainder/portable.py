"""The remainder in Triton: the split kernel of the low-rank scan with values, and the merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import launch_options
from model1.ops.selector.portable_kernel import _lowrank_combine_kernel, _lowrank_split_fwd_kernel
from model1.ops.selector.portable_scan import Scan, scan_case
from model1.ops.selector.portable_sizes import Config, ScanShape, choose_config, row_chunks

_COMBINE_WARPS = 4
_COMBINE_ELEMENTS = 4096  # of partial results that a program of the merge holds


def lowrank_remainder_triton(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_indices: Tensor, *,
    max_seqlen: int, rotary_value: bool, layout: KVLayout, block_size: int, deterministic: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.lowrank_remainder.lowrank_remainder`."""
    scan = Scan(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        max_seqlen, layout, block_size,
    )  # fmt: skip
    t, h, _ = scan_q.shape
    width = scan_q.shape[2] if rotary_value else index_cache.shape[1]
    device = scan_q.device
    out = torch.zeros(t, h, width, dtype=scan_q.dtype, device=device)
    lse = torch.full((t, h), float("-inf"), dtype=torch.float32, device=device)
    if scan.is_empty:
        return out, lse
    stride_core = -(-(max_seqlen + 1) // 16) * 16
    split_bytes = 4 * h * (width + 1)
    # beside the mask itself, what `core_mask` makes of the indices: int64 and a comparison
    row_bytes = stride_core + 9 * core_indices.shape[1]
    config, cut = scan.cut(config, row_bytes, split_bytes, deterministic=deterministic)
    sizes = (cut.rows, h, cut.num_splits)
    partial = torch.empty(*sizes, width, dtype=torch.float32, device=device)
    partial_lse = torch.empty(sizes, dtype=torch.float32, device=device)
    options = launch_options(config.num_warps, config.num_stages)
    for first, end in row_chunks(t, cut.rows):
        core = core_mask(core_indices[first:end], max_seqlen, stride_core)
        with torch.cuda.device_of(scan_q):
            _lowrank_split_fwd_kernel[(scan.num_programs(cut),)](
                core_ptr=core, out_ptr=partial, lse_ptr=partial_lse, stride_core=stride_core,
                min_split_tiles=cut.min_split_tiles,
                **_value_constants(scan.shape, rotary_value),
                **scan.arguments(config, cut, (first, end)), **options,
            )  # fmt: skip
            _lowrank_combine_kernel[((end - first) * h,)](
                partial, partial_lse, out[first:end], lse[first:end], cut.num_splits,
                **_combine_constants(width), **launch_options(_COMBINE_WARPS, 1),
            )  # fmt: skip
    return out, lse


def core_mask(core_indices: Tensor, max_seqlen: int, width: int) -> Tensor:
    """[rows, width] uint8, 1 at the core's positions; column max_seqlen takes what is unused."""
    mask = torch.zeros(len(core_indices), width, dtype=torch.uint8, device=core_indices.device)
    is_unused = (core_indices < 0) | (core_indices >= max_seqlen)
    column = core_indices.long().masked_fill_(is_unused, max_seqlen)
    return mask.scatter_(1, column, 1)


def _value_constants(shape: ScanShape, rotary_value: bool) -> dict[str, Any]:
    end = shape.r + (shape.layout.d_rope if rotary_value else 0)
    return {"NUM_VALUE_PIECES": sum(start < end for start, _, _ in shape.pieces), "VALUE_DIM": end}


def _combine_constants(width: int) -> dict[str, Any]:
    block_c = next_power_of_2(width)
    block_s = max(1, min(32, _COMBINE_ELEMENTS // block_c))
    return {"VALUE_DIM": width, "BLOCK_C": block_c, "BLOCK_S": block_s}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rank 64 with rotary values beside MODEL1 tokens, as the selector's list has it."""
    cases = []
    layout = KVLayout("model1_fp8", 448, 64)
    for h, is_single in ((16, True), (64, True), (128, True), (16, False)):
        shape = ScanShape(h=h, r=64, layout=layout, block_size=64, dtype=torch.bfloat16)
        config = choose_config(target, shape, is_single=is_single)
        name = f"lowrank_remainder h{h}{'' if is_single else ' prefill'}"
        values = _value_constants(shape, True)
        cases.append(scan_case(name, _lowrank_split_fwd_kernel, shape, config, values))
    signature = {
        "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16",
        "lse_ptr": "*fp32", "num_splits": "i32",
    }  # fmt: skip
    kernel, constants = _lowrank_combine_kernel, _combine_constants(128)
    name = "lowrank_combine"
    cases.append(CompileCase(name, kernel, signature, constants, _COMBINE_WARPS, 1))
    return cases

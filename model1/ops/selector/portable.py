"""The selectors in Triton: launches and the list of kernels.

A chunk of rows takes two launches over the keys, for the log-sum-exp of every head and for the
votes that it normalises, then the choice. Chunks bound the votes, [rows, max_seqlen] fp32, to
`WORKSPACE_BYTES`. Nothing waits for the device: the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import launch_options
from model1.ops.selector.portable_kernel import _lowrank_split_fwd_kernel, _lowrank_votes_kernel
from model1.ops.selector.portable_scan import Scan, scan_case
from model1.ops.selector.portable_select import SELECT_BYTES, select_cases, store_largest
from model1.ops.selector.portable_sizes import Config, ScanShape, choose_config, row_chunks

# The split kernel without a core to leave out and without values: only the log-sum-exp.
_NO_VALUES: dict[str, Any] = {
    "core_ptr": None, "out_ptr": None, "NUM_VALUE_PIECES": 0, "VALUE_DIM": 0
}  # fmt: skip


def lowrank_topk_triton(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_count: Tensor, *, topk: int,
    sliding_window: int, max_seqlen: int, layout: KVLayout, block_size: int, deterministic: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.selector.lowrank_topk`. fp32 queries multiply in IEEE fp32, slowly."""
    scan = Scan(
        scan_q, index_cache, kv_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end,
        max_seqlen, layout, block_size,
    )  # fmt: skip
    t, h, _ = scan_q.shape
    device = scan_q.device
    topk_indices = torch.full((t, topk), -1, dtype=torch.int32, device=device)
    lse = torch.full((t, h), float("-inf"), dtype=torch.float32, device=device)
    if scan.is_empty:
        return topk_indices, lse
    width = -(-max_seqlen // 4) * 4
    row_bytes = 4 * width + SELECT_BYTES
    config, cut = scan.cut(config, row_bytes, 4 * h, deterministic=deterministic)
    votes = torch.empty(cut.rows, width, dtype=torch.float32, device=device)
    partial = torch.empty(cut.rows, h, cut.num_splits, dtype=torch.float32, device=device)
    options = launch_options(config.num_warps, config.num_stages)
    grid = (scan.num_programs(cut),)
    for first, end in row_chunks(t, cut.rows):
        arguments = scan.arguments(config, cut, (first, end))
        with torch.cuda.device_of(scan_q):
            _lowrank_split_fwd_kernel[grid](
                lse_ptr=partial, stride_core=0, min_split_tiles=cut.min_split_tiles,
                **_NO_VALUES, **arguments, **options,
            )  # fmt: skip
            _lowrank_votes_kernel[grid](
                partial_ptr=partial, votes_ptr=votes, lse_ptr=lse, window=sliding_window,
                stride_votes=width, **arguments, **options,
            )  # fmt: skip
        store_largest(
            votes, key_end[first:end], core_count[first:end], max_seqlen, topk_indices[first:end]
        )
    return topk_indices, lse


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rank 64 beside MODEL1 tokens in blocks of 64: one query of 16, 64 and 128 heads, and many."""
    cases = select_cases()
    layout = KVLayout("model1_fp8", 448, 64)
    for h, is_single in ((16, True), (64, True), (128, True), (16, False)):
        shape = ScanShape(h=h, r=64, layout=layout, block_size=64, dtype=torch.bfloat16)
        config = choose_config(target, shape, is_single=is_single)
        name = f"h{h}{'' if is_single else ' prefill'}"
        kernel = _lowrank_split_fwd_kernel
        cases.append(scan_case(f"lowrank_lse {name}", kernel, shape, config, _NO_VALUES))
        kernel = _lowrank_votes_kernel
        cases.append(scan_case(f"lowrank_votes {name}", kernel, shape, config, {}))
    return cases

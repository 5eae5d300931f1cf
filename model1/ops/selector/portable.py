"""The selectors in Triton: launches and the list of kernels.

A chunk of rows takes one launch over the keys and one over the weights that it stores
(`portable_votes`), or two over the keys, for the log-sum-exp of every head and for the votes that
it normalises (`portable_kernel`); then the choice (`portable_select`). Chunks bound its memory and
the weights to `WORKSPACE_BYTES`. Nothing waits for the device: the launches can be captured in
a CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import device_target, launch_options
from model1.ops.selector.portable_kernel import _lowrank_split_fwd_kernel, _lowrank_votes_kernel
from model1.ops.selector.portable_scan import Scan, scan_case
from model1.ops.selector.portable_select import (
    Choice,
    can_overlap,
    overlap_options,
    select_bytes,
    select_cases,
)
from model1.ops.selector.portable_sizes import Config, ScanShape, choose_config, row_chunks
from model1.ops.selector.portable_votes import _lowrank_tally_kernel, _lowrank_weights_kernel

# Of the pass that stores weights; two do not keep the memory busy.
_PROGRAMS_PER_SM = 4
_TALLY_COLUMNS, _TALLY_WARPS = 1024, 4
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
    if scan.is_empty:
        lse = torch.full((t, h), float("-inf"), dtype=torch.float32, device=device)
        return torch.full((t, topk), -1, dtype=torch.int32, device=device), lse
    topk_indices = torch.empty(t, topk, dtype=torch.int32, device=device)
    lse = torch.empty(t, h, dtype=torch.float32, device=device)
    # what a row's bits follow from must not depend on its batch mates
    is_single = deterministic or max_seqlen_q == 1
    find_votes = _stored_votes if is_single and scan.shape.stores_weights else _scanned_votes
    find_votes(scan, config, deterministic, core_count, sliding_window, topk_indices, lse)
    return topk_indices, lse


def _scanned_votes(
    scan: Scan, config: Config | None, deterministic: bool, core_count: Tensor, window: int,
    topk_indices: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """The choice by two readings of the keys."""
    h, device = scan.shape.h, lse.device
    row_bytes = select_bytes(scan.max_seqlen)
    config, cut = scan.cut(config, row_bytes, 4 * h, deterministic=deterministic)
    choice = Choice.empty(cut.rows, scan.max_seqlen, device)
    partial = torch.empty(cut.rows, h, cut.num_splits, dtype=torch.float32, device=device)
    options = launch_options(config.num_warps, config.num_stages)
    grid = (scan.num_programs(cut),)
    for first, end in row_chunks(len(lse), cut.rows):
        arguments = scan.arguments(config, cut, (first, end))
        with torch.cuda.device_of(lse):
            _lowrank_split_fwd_kernel[grid](
                lse_ptr=partial, stride_core=0, min_split_tiles=cut.min_split_tiles,
                **_NO_VALUES, **arguments, **options,
            )  # fmt: skip
            _lowrank_votes_kernel[grid](
                partial_ptr=partial, votes_ptr=choice.scores, lse_ptr=lse, window=window,
                stride_votes=choice.scores.stride(0), **choice.state_arguments, **arguments,
                **options,
            )  # fmt: skip
        choice.store_largest(
            scan.key_end[first:end], core_count[first:end], scan.max_seqlen,
            topk_indices[first:end],
        )  # fmt: skip


def _stored_votes(
    scan: Scan, config: Config | None, deterministic: bool, core_count: Tensor, window: int,
    topk_indices: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """The choice by one reading of the keys, which stores the weights of every head."""
    h, device = scan.shape.h, lse.device
    config = config or replace(
        choose_config(device_target(device), scan.shape, is_single=True),
        programs_per_sm=_PROGRAMS_PER_SM,
    )
    num_tiles = -(-scan.max_seqlen // config.block_n)
    dtype = torch.float32 if scan.scan_q.dtype == torch.float32 else torch.uint16
    row_bytes = num_tiles * h * (config.block_n * dtype.itemsize + 4)
    row_bytes += select_bytes(scan.max_seqlen)
    config, cut = scan.cut(config, row_bytes, 4 * h, deterministic=deterministic)
    choice = Choice.empty(cut.rows, scan.max_seqlen, device)
    weights = torch.empty(cut.rows, h, num_tiles, config.block_n, dtype=dtype, device=device)
    largest = torch.empty(cut.rows, h, num_tiles, dtype=torch.float32, device=device)
    partial = torch.empty(cut.rows, h, cut.num_splits, dtype=torch.float32, device=device)
    num_chunks = -(-scan.max_seqlen // _TALLY_COLUMNS)
    constants = _tally_constants(scan.shape, config) | overlap_options(device)
    for first, end in row_chunks(len(lse), cut.rows):
        key_end, count = scan.key_end[first:end], core_count[first:end]
        chosen = topk_indices[first:end]
        with torch.cuda.device_of(lse):
            _lowrank_weights_kernel[(scan.num_programs(cut),)](
                weights_ptr=weights, largest_ptr=largest, partial_ptr=partial, num_tiles=num_tiles,
                min_split_tiles=cut.min_split_tiles, **choice.state_arguments,
                **scan.arguments(config, cut, (first, end)),
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
            _lowrank_tally_kernel[((end - first) * num_chunks,)](
                weights, largest, partial, count, key_end, choice.scores, lse[first:end],
                choice.state, scan.max_seqlen, chosen.shape[1], num_chunks, cut.num_splits,
                num_tiles, window, choice.scores.stride(0), **constants,
                **launch_options(_TALLY_WARPS, 1),
            )  # fmt: skip
        choice.store_largest(key_end, count, scan.max_seqlen, chosen, is_counted=True)


def _tally_constants(shape: ScanShape, config: Config) -> dict[str, Any]:
    return {"H": shape.h, "TILE": config.block_n, "COLUMNS": _TALLY_COLUMNS}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rank 64 beside MODEL1 tokens in blocks of 64: one query of 16, 64 and 128 heads, and many."""
    cases = select_cases(target)
    layout = KVLayout("model1_fp8", 448, 64)
    for h, is_single in ((16, True), (64, True), (128, True), (16, False)):
        shape = ScanShape(h=h, r=64, layout=layout, block_size=64, dtype=torch.bfloat16)
        config = choose_config(target, shape, is_single=is_single)
        name = f"h{h}{'' if is_single else ' prefill'}"
        if is_single and shape.stores_weights:
            kernel = _lowrank_weights_kernel
            cases.append(scan_case(f"lowrank_weights {name}", kernel, shape, config, {}))
            constants = _tally_constants(shape, config) | {"OVERLAPS": can_overlap(target)}
            cases.append(_tally_case(f"lowrank_tally {name}", constants))
            continue
        kernel = _lowrank_split_fwd_kernel
        cases.append(scan_case(f"lowrank_lse {name}", kernel, shape, config, _NO_VALUES))
        kernel = _lowrank_votes_kernel
        cases.append(scan_case(f"lowrank_votes {name}", kernel, shape, config, {}))
    return cases


def _tally_case(name: str, constants: dict[str, Any]) -> CompileCase:
    kernel = _lowrank_tally_kernel
    pointers = {
        "weights_ptr": "*u16", "largest_ptr": "*fp32", "partial_ptr": "*fp32", "count_ptr": "*i32",
        "key_end_ptr": "*i32", "votes_ptr": "*fp32", "lse_ptr": "*fp32", "state_ptr": "*i32",
    }  # fmt: skip
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
    return CompileCase(name, kernel, signature, constants, _TALLY_WARPS, 1)

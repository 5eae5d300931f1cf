# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The lightning indexer in Triton: one pass over paged 8-bit keys, then the choice.

e4m3 numbers are exact in fp16, and so are their products in the fp32 sums of its matrix unit; that
of e4m3 itself sums with fewer bits on sm_89 and sm_90.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.errors import BackendUnavailable
from model1.ops.channel_pieces import channel_pieces
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.bits import e4m3_to_fp32
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import device_target, launch_options, num_sms
from model1.ops.online_softmax import scaled_scores
from model1.ops.selector.portable_digits import clear_state
from model1.ops.selector.portable_keys import (
    block_ids,
    load_queries,
    program_rows,
    split_keys,
    visible_keys,
)
from model1.ops.selector.portable_select import Choice, select_bytes
from model1.ops.selector.portable_sizes import (
    MAX_HEADS,
    WORKSPACE_BYTES,
    Config,
    choose_num_splits,
    row_chunks,
)


@triton.jit
def _numbers(codes, HAS_FP8: tl.constexpr, COMPUTE: tl.constexpr):
    """e4m3 codes, given as uint8, in COMPUTE."""
    if HAS_FP8:
        return codes.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    else:
        return e4m3_to_fp32(codes).to(COMPUTE)


_SIZES = [
    "row_first", "row_end", "max_seqlen", "row_tiles", "num_splits", "stride_table",
    "stride_scores", "state_words",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _lightning_scores_kernel(
    q_ptr,  # codes
    weights_ptr,
    key_ptr,  # codes
    scale_ptr,
    table_ptr,
    cu_seqlens_q_ptr,
    key_end_ptr,
    scores_ptr,  # [rows, stride_scores] fp32
    state_ptr,  # [state_words] int32: of the choice, which begins with zeros
    state_words,
    row_first,
    row_end,
    max_seqlen,
    row_tiles,
    num_splits,
    stride_qt,
    stride_qh,
    stride_table,
    stride_scores,
    H: tl.constexpr,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all heads
    BLOCK_N: tl.constexpr,
):
    """Index scores of a tile of rows for the keys of one split."""
    clear_state(state_ptr, state_words)
    request, split, first, last, row, head, is_row = program_rows(
        tl.program_id(0), 0, cu_seqlens_q_ptr, row_first, row_end, row_tiles, num_splits,
        H, QUERIES, BLOCK_H,
    )  # fmt: skip
    if first >= last:
        return
    query = first + tl.arange(0, QUERIES)
    end = tl.max(visible_keys(key_end_ptr, query, query < last, max_seqlen), 0)
    start, end = split_keys(end, split, num_splits, 1, BLOCK_N)

    weight = tl.load(weights_ptr + row.to(tl.int64) * H + head, mask=is_row, other=0.0)
    offsets = row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    codes = load_queries(q_ptr, offsets, is_row, PIECES)
    q = ()
    for i in tl.static_range(len(PIECES)):
        q += (_numbers(codes[i], HAS_FP8, COMPUTE),)
    scores_ptr += (query - row_first).to(tl.int64)[:, None] * stride_scores
    table_ptr += request.to(tl.int64) * stride_table
    blocks = block_ids(table_ptr, start, end, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        is_key = key < end
        slot = blocks.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        scale = tl.load(scale_ptr + slot, mask=is_key, other=0.0)
        keys = ()
        for i in tl.static_range(len(PIECES)):
            channel = PIECES[i][0] + tl.arange(0, PIECES[i][1])
            mask = is_key[:, None] & (channel < PIECES[i][2])[None, :]
            code = tl.load(key_ptr + (slot * D)[:, None] + channel[None, :], mask=mask, other=0)
            keys += (_numbers(code, HAS_FP8, COMPUTE),)
        blocks = block_ids(table_ptr, n + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        logits = tl.maximum(scaled_scores(q, keys, 1.0, False), 0.0) * weight[:, None]
        scores = tl.sum(tl.reshape(logits, (QUERIES, BLOCK_H, BLOCK_N)), 1) * scale[None, :]
        tl.store(scores_ptr + key[None, :], scores, mask=(query < last)[:, None] & is_key[None, :])


def choose_config(h: int, *, is_single: bool) -> Config:
    """The sizes for every GPU. Not yet measured."""
    if h > MAX_HEADS:
        raise BackendUnavailable(f"lightning_topk/triton takes {MAX_HEADS} heads, got {h}")
    block_m = max(16, next_power_of_2(h) if is_single else 64)
    num_warps = 8 if block_m > 64 else 4
    return Config(block_m=block_m, block_n=64, num_warps=num_warps, num_stages=3)


def lightning_topk_triton(
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    index_scale: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    key_end: Tensor,
    *,
    topk: int,
    max_seqlen: int,
    block_size: int,
    config: Config | None = None,
) -> Tensor:
    """See `model1.ops.selector.lightning_topk`."""
    t, h, d = q.shape
    if 0 in (t, len(block_table), max_seqlen):
        return torch.full((t, topk), -1, dtype=torch.int32, device=q.device)
    topk_indices = torch.empty(t, topk, dtype=torch.int32, device=q.device)
    config = config or choose_config(h, is_single=max_seqlen_q == 1)
    constants = _constants(h, d, block_size, config, device_target(q.device))
    rows = max(1, min(t, WORKSPACE_BYTES // select_bytes(max_seqlen)))
    row_tiles = triton.cdiv(min(rows, max_seqlen_q), constants["QUERIES"])
    tiles = min(t, len(block_table) * row_tiles)
    num_splits = config.num_splits or choose_num_splits(
        tiles, max_seqlen, config.programs_per_sm * num_sms(q.device)
    )
    choice = Choice.empty(rows, max_seqlen, q.device)
    for first, end in row_chunks(t, rows):
        with torch.cuda.device_of(q):
            _lightning_scores_kernel[(len(block_table) * row_tiles * num_splits,)](
                q.view(torch.uint8), weights, index_cache, index_scale, block_table, cu_seqlens_q,
                key_end, choice.scores, choice.state, choice.state.numel(), first, end, max_seqlen,
                row_tiles, num_splits, q.stride(0), q.stride(1), block_table.stride(0),
                choice.scores.stride(0), **constants,
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
        choice.store_largest(key_end[first:end], None, max_seqlen, topk_indices[first:end])
    return topk_indices


def _constants(
    h: int, d: int, block_size: int, config: Config, target: KernelTarget
) -> dict[str, Any]:
    block_h = next_power_of_2(h)
    return {
        "H": h, "D": d, "PIECES": channel_pieces(0, d, 128), "BLOCK_SIZE": block_size,
        "HAS_FP8": target.has_fp8,
        # the interpreter multiplies matrices in fp32 alone
        "COMPUTE": tl.float32 if knobs.runtime.interpret else tl.float16,
        "QUERIES": max(1, config.block_m // block_h), "BLOCK_H": block_h,
        "BLOCK_N": config.block_n,
    }  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """V3.2's 64 heads of 128 channels in blocks of 64: one query and many; 32 heads."""
    signature = {
        "q_ptr": "*u8", "weights_ptr": "*fp32", "key_ptr": "*u8", "scale_ptr": "*fp32",
        "table_ptr": "*i32", "cu_seqlens_q_ptr": "*i32", "key_end_ptr": "*i32",
        "scores_ptr": "*fp32", "state_ptr": "*i32",
    }  # fmt: skip
    kernel, cases = _lightning_scores_kernel, []
    types = dict.fromkeys(kernel.arg_names, "i32") | signature
    for h, is_single in ((32, True), (64, True), (32, False)):
        config = choose_config(h, is_single=is_single)
        constants = _constants(h, 128, 64, config, target)
        # contiguous queries: the launcher sees that their strides are multiples of 16
        constants |= {"stride_qt": 128 * h, "stride_qh": 128}
        name = f"lightning_scores h{h}{'' if is_single else ' prefill'}"
        cases.append(
            CompileCase(name, kernel, types, constants, config.num_warps, config.num_stages)
        )
    return cases

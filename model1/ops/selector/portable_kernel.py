# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The passes over the low-rank vectors in Triton: log-sum-exp or attention, and the votes.

Both walk the keys of one request, split over programs, with the same tile of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import (
    LN_2,
    LOG2_E,
    LOWEST_LOGIT,
    attend_tile,
    log2_sum_of,
    merge_step,
    scaled_scores,
)
from model1.ops.selector.portable_digits import clear_state
from model1.ops.selector.portable_keys import (
    block_ids,
    load_keys,
    load_queries,
    merged_lse,
    program_rows,
    split_keys,
    visible_keys,
)

_SPLITS = tl.constexpr(32)  # merged at once
# These change from call to call: a kernel for each kind of number would be compiled in mid-service.
_SIZES = [
    "row_first", "row_end", "max_seqlen", "row_tiles", "num_splits", "min_split_tiles",
    "stride_table", "stride_core",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _lowrank_split_fwd_kernel(
    q_ptr,
    z_ptr,
    rope_ptr,  # the first token's rotary channels
    table_ptr,
    cu_seqlens_q_ptr,
    key_end_ptr,
    core_ptr,  # None, or [rows, stride_core] uint8: 1 = in the core, not attended here
    out_ptr,  # [rows, H, num_splits, VALUE_DIM] fp32
    lse_ptr,  # [rows, H, num_splits] fp32, base 2
    row_first,
    row_end,
    max_seqlen,
    row_tiles,
    num_splits,
    min_split_tiles,
    stride_qt,
    stride_qh,
    stride_z,
    stride_rope,
    stride_table,
    stride_core,
    H: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    NUM_VALUE_PIECES: tl.constexpr,  # 0: only the log-sum-exp
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_ROPE_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of a tile of rows over the keys of one split; values are the keys' own channels."""
    BLOCK_M: tl.constexpr = QUERIES * BLOCK_H
    pid, head_tiles = tl.program_id(0), tl.cdiv(H, BLOCK_H)
    request, split, first, last, row, head, is_row = program_rows(
        pid // head_tiles, pid % head_tiles * BLOCK_H, cu_seqlens_q_ptr, row_first, row_end,
        row_tiles, num_splits, H, QUERIES, BLOCK_H,
    )  # fmt: skip
    if first >= last:
        return
    num_keys = visible_keys(key_end_ptr, row, is_row, max_seqlen)
    end = tl.max(num_keys, 0)
    start, end = split_keys(end, split, num_splits, min_split_tiles, BLOCK_N)

    offsets = row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q = load_queries(q_ptr, offsets, is_row, PIECES)
    out = ()
    for i in tl.static_range(NUM_VALUE_PIECES):
        out += (tl.zeros(q[i].shape, tl.float32),)
    largest = tl.full([BLOCK_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_ptr += request.to(tl.int64) * stride_table
    if core_ptr is not None:
        core_row = first + tl.arange(0, QUERIES)
        core_ptr += (core_row - row_first).to(tl.int64)[:, None] * stride_core
        is_core_row = (core_row < last)[:, None]
    blocks = block_ids(table_ptr, start, end, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        keys = load_keys(
            z_ptr, rope_ptr, blocks, key % BLOCK_SIZE, key < end, stride_z, stride_rope,
            PIECES, R, STRIDE_ROPE_ROW, BLOCK_SIZE, COMPUTE,
        )  # fmt: skip
        # the next tile's blocks are on their way while this one is used
        blocks = block_ids(table_ptr, n + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        is_attended = (key < end)[None, :] & (key[None, :] < num_keys[:, None])
        if core_ptr is not None:
            mask = is_core_row & (key < end)[None, :]
            core = tl.load(core_ptr + key[None, :], mask=mask, other=1) != 0
            core = tl.broadcast_to(core[:, None, :], (QUERIES, BLOCK_H, BLOCK_N))
            is_attended &= ~tl.reshape(core, (BLOCK_M, BLOCK_N))
        out, largest, total = attend_tile(
            q, keys, keys, LOG2_E, is_attended, out, largest, total, True, True, False
        )

    at = ((row - row_first).to(tl.int64) * H + head) * num_splits + split
    log2_sum, normalizer = log2_sum_of(largest, total)
    tl.store(lse_ptr + at, log2_sum, mask=is_row)
    for i in tl.static_range(NUM_VALUE_PIECES):
        channel = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (channel < PIECES[i][2])[None, :]
        result = out[i] * normalizer[:, None]
        tl.store(out_ptr + (at * VALUE_DIM)[:, None] + channel[None, :], result, mask=mask)


@triton.jit(do_not_specialize=[*_SIZES, "state_words", "window", "stride_votes"])
def _lowrank_votes_kernel(
    q_ptr,
    z_ptr,
    rope_ptr,
    table_ptr,
    cu_seqlens_q_ptr,
    key_end_ptr,
    partial_ptr,  # [rows, H, num_splits] fp32, base 2: what the split kernel has left
    votes_ptr,  # [rows, stride_votes] fp32
    lse_ptr,  # [t, H] fp32, natural
    state_ptr,  # [state_words] int32: of the choice, which begins with zeros
    state_words,
    row_first,
    row_end,
    max_seqlen,
    row_tiles,
    num_splits,
    window,
    stride_qt,
    stride_qh,
    stride_z,
    stride_rope,
    stride_table,
    stride_votes,
    H: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_ROPE_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all heads
    BLOCK_N: tl.constexpr,
):
    """Probability of every visible key, summed over heads; inf in the window."""
    clear_state(state_ptr, state_words)
    request, split, first, last, row, head, is_row = program_rows(
        tl.program_id(0), 0, cu_seqlens_q_ptr, row_first, row_end, row_tiles, num_splits,
        H, QUERIES, BLOCK_H,
    )  # fmt: skip
    if first >= last:
        return
    at = ((row - row_first).to(tl.int64) * H + head) * num_splits
    lse = merged_lse(partial_ptr, at, is_row, num_splits, _SPLITS)
    if split == 0:
        tl.store(lse_ptr + row.to(tl.int64) * H + head, lse * LN_2, mask=is_row)
    # weight 0 for heads that do not exist
    lse = tl.where(is_row, lse, float("inf"))
    query = first + tl.arange(0, QUERIES)
    num_keys = visible_keys(key_end_ptr, query, query < last, max_seqlen)
    end = tl.max(num_keys, 0)
    start, end = split_keys(end, split, num_splits, 1, BLOCK_N)
    votes_ptr += (query - row_first).to(tl.int64)[:, None] * stride_votes
    is_query = (query < last)[:, None]

    offsets = row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q = load_queries(q_ptr, offsets, is_row, PIECES)
    table_ptr += request.to(tl.int64) * stride_table
    blocks = block_ids(table_ptr, start, end, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        keys = load_keys(
            z_ptr, rope_ptr, blocks, key % BLOCK_SIZE, key < end, stride_z, stride_rope,
            PIECES, R, STRIDE_ROPE_ROW, BLOCK_SIZE, COMPUTE,
        )  # fmt: skip
        blocks = block_ids(table_ptr, n + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        logits = scaled_scores(q, keys, LOG2_E, False)
        share_of_head = tl.reshape(tl.exp2(logits - lse[:, None]), (QUERIES, BLOCK_H, BLOCK_N))
        votes = tl.sum(share_of_head, 1)
        votes = tl.where(key[None, :] >= num_keys[:, None] - window, float("inf"), votes)
        tl.store(votes_ptr + key[None, :], votes, mask=is_query & (key < end)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _lowrank_combine_kernel(
    partial_ptr,  # [rows, num_splits, VALUE_DIM] fp32
    partial_lse_ptr,  # [rows, num_splits] fp32, base 2
    out_ptr,  # [rows, VALUE_DIM]
    lse_ptr,  # [rows] fp32, natural
    num_splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row (query and head): its partial results, each weighted with 2^lse."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    largest, total = LOWEST_LOGIT, 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = row * num_splits + split
        lse = tl.load(partial_lse_ptr + at, mask=split < num_splits, other=float("-inf"))
        # a split without keys has no output worth reading
        mask = (lse != float("-inf"))[:, None] & (channel < VALUE_DIM)[None, :]
        part = tl.load(
            partial_ptr + (at * VALUE_DIM)[:, None] + channel[None, :], mask=mask, other=0.0
        )
        acc, largest, total = merge_step(lse, part, acc, largest, total)
    log2_sum, normalizer = log2_sum_of(largest, total)
    tl.store(lse_ptr + row, log2_sum * LN_2)
    out = (acc * normalizer).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * VALUE_DIM + channel, out, mask=channel < VALUE_DIM)

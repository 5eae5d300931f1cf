# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The votes of few heads in Triton, from one reading of the keys.

A vote needs the log-sum-exp of its heads over all keys. Where a head's weight of a key takes less
room than the key itself, the first kernel stores the weights, relative to the largest of the head
in a tile of keys, and the second turns them into votes; otherwise `portable_kernel` reads the keys
twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import LN_2, LOG2_E, LOWEST_LOGIT, log2_sum_of, scaled_scores
from model1.ops.selector.portable_digits import (
    STATE,
    await_launch,
    clear_state,
    count_first,
    num_chosen,
)
from model1.ops.selector.portable_keys import (
    block_ids,
    load_keys,
    load_queries,
    merged_lse,
    program_rows,
    split_keys,
    visible_keys,
)

_HEADS = tl.constexpr(16)  # of one step of the second kernel
_SPLITS = tl.constexpr(64)  # merged at once


@triton.jit
def _encode(weights, ptr):
    """Weights, at most 1, as they are stored: fp32, or 16 bits with 10 of them for the fraction.

    The other 6 are for the exponent. Below 2^-63 is 0; a NaN is the largest number, and its head's
    log-sum-exp is NaN. bf16 rounds too coarsely, fp16 ends at 6e-8.
    """
    if ptr.dtype.element_ty == tl.float32:
        return weights
    else:
        bits = (weights.to(tl.int32, bitcast=True) + 0x1000) >> 13
        return tl.minimum(tl.maximum(bits - (64 << 10), 0), 0xFFFF).to(tl.uint16)


@triton.jit
def _decode(codes, ptr):
    """What `_encode` has stored; 2^-63 for 0."""
    if ptr.dtype.element_ty == tl.float32:
        return codes
    else:
        return ((codes.to(tl.int32) + (64 << 10)) << 13).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "row_first", "row_end", "max_seqlen", "row_tiles", "num_splits", "min_split_tiles",
        "num_tiles", "stride_table", "state_words",
    ]
)  # fmt: skip
def _lowrank_weights_kernel(
    q_ptr,
    z_ptr,
    rope_ptr,  # the first token's rotary channels
    table_ptr,
    cu_seqlens_q_ptr,
    key_end_ptr,
    weights_ptr,  # [rows, H, num_tiles, BLOCK_N], fp32 or coded in 16 bits
    largest_ptr,  # [rows, H, num_tiles] fp32, base 2: what a tile's weights are relative to
    partial_ptr,  # [rows, H, num_splits] fp32, base 2: the log-sum-exp of a split
    state_ptr,  # [state_words] int32: of the choice, which begins with zeros
    state_words,
    row_first,
    row_end,
    max_seqlen,
    row_tiles,
    num_splits,
    min_split_tiles,
    num_tiles,
    stride_qt,
    stride_qh,
    stride_z,
    stride_rope,
    stride_table,
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
    """The softmax weights of a tile of rows for the keys of one split."""
    BLOCK_M: tl.constexpr = QUERIES * BLOCK_H
    clear_state(state_ptr, state_words)
    request, split, first, last, row, head, is_row = program_rows(
        tl.program_id(0), 0, cu_seqlens_q_ptr, row_first, row_end, row_tiles, num_splits,
        H, QUERIES, BLOCK_H,
    )  # fmt: skip
    if first >= last:
        return
    num_keys = visible_keys(key_end_ptr, row, is_row, max_seqlen)
    start, end = split_keys(tl.max(num_keys, 0), split, num_splits, min_split_tiles, BLOCK_N)

    offsets = row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q = load_queries(q_ptr, offsets, is_row, PIECES)
    local = (row - row_first).to(tl.int64)
    largest = tl.full([BLOCK_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_ptr += request.to(tl.int64) * stride_table
    blocks = block_ids(table_ptr, start, end, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        keys = load_keys(
            z_ptr, rope_ptr, blocks, key % BLOCK_SIZE, key < end, stride_z, stride_rope,
            PIECES, R, STRIDE_ROPE_ROW, BLOCK_SIZE, COMPUTE,
        )  # fmt: skip
        # the next tile's blocks are on their way while this one is used
        blocks = block_ids(table_ptr, n + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        logits = scaled_scores(q, keys, LOG2_E, False)
        logits = tl.where(key[None, :] < num_keys[:, None], logits, float("-inf"))
        tile_largest = tl.maximum(tl.max(logits, 1), LOWEST_LOGIT)
        weights = tl.exp2(logits - tile_largest[:, None])
        previous = largest
        largest = tl.maximum(previous, tile_largest)
        total *= tl.exp2(previous - largest)
        total += tl.sum(weights, 1) * tl.exp2(tile_largest - largest)
        at = (local * H + head) * num_tiles + n // BLOCK_N
        tl.store(largest_ptr + at, tile_largest, mask=is_row)
        codes_ptr = weights_ptr + (at * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        tl.store(codes_ptr, _encode(weights, weights_ptr), mask=is_row[:, None])
    log2_sum, _ = log2_sum_of(largest, total)
    tl.store(partial_ptr + (local * H + head) * num_splits + split, log2_sum, mask=is_row)


@triton.jit(
    do_not_specialize=[
        "max_seqlen", "topk", "num_chunks", "num_splits", "num_tiles", "window", "stride_votes",
    ]
)  # fmt: skip
def _lowrank_tally_kernel(
    weights_ptr, largest_ptr, partial_ptr, count_ptr, key_end_ptr,
    votes_ptr,  # [rows, stride_votes] fp32
    lse_ptr,  # [rows, H] fp32, natural
    state_ptr,  # [rows, STATE] int32: of the choice
    max_seqlen, topk, num_chunks, num_splits, num_tiles, window, stride_votes,
    H: tl.constexpr, TILE: tl.constexpr, OVERLAPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Probability of a chunk of keys, summed over heads, inf in the window; their first digits."""
    TILES: tl.constexpr = COLUMNS // TILE
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, _ = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    await_launch(OVERLAPS)
    local = row.to(tl.int64)
    tile = chunk * TILES + tl.arange(0, TILES)
    is_tile = tile * TILE < num_keys
    votes = tl.zeros([TILES, TILE], tl.float32)
    for first in range(0, H, _HEADS):
        head = first + tl.arange(0, _HEADS)
        is_head = head < H
        # tiles first: Triton gives lanes to the first of two axes, and a sum across lanes is slow
        at = tile[:, None] + ((local * H + head) * num_tiles)[None, :]
        mask = is_tile[:, None] & is_head[None, :]
        codes_ptr = weights_ptr + (at * TILE)[:, :, None] + tl.arange(0, TILE)[None, None, :]
        # on their way while the splits are merged
        codes = tl.load(codes_ptr, mask=mask[:, :, None], other=0)
        largest = tl.load(largest_ptr + at, mask=mask, other=LOWEST_LOGIT)
        lse = merged_lse(partial_ptr, (local * H + head) * num_splits, is_head, num_splits, _SPLITS)
        if chunk == 0:
            tl.store(lse_ptr + local * H + head, lse * LN_2, mask=is_head)
        # weight 0 for heads that do not exist and rows without keys
        lse = tl.where(is_head & (lse != float("-inf")), lse, float("inf"))
        weights = _decode(codes, weights_ptr)
        votes += tl.sum(weights * tl.exp2(largest - lse[None, :])[:, :, None], 1)
    if chunk * COLUMNS >= num_keys:
        return
    votes = tl.reshape(votes, [COLUMNS])
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    votes = tl.where(column >= num_keys - window, float("inf"), votes)
    tl.store(votes_ptr + local * stride_votes + column, votes, mask=column < num_keys)
    count_first(state_ptr + local * STATE, votes, column < num_keys)

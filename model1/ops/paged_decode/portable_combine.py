"""How the partial results of a row become one: Triton.

Each part of a request leaves, per row, its normalised output and the base-2 logarithm of its
softmax denominator (`portable_schedule`); this kernel weighs the outputs by the denominators.
"""

# pyright: reportMissingParameterType=none
# Only constexpr parameters of a kernel carry types.

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import LN_2, LOG2_E, LOWEST_LOGIT, log2_sum_of, merge_step
from model1.ops.paged_decode.portable_schedule import (
    BALANCED,
    all_tiles,
    balanced_range,
    first_query_of,
    num_queries_of,
    request_at,
    seqlen_of,
    tiles_before,
    tiles_of,
)


@triton.jit
def sink_factor(attn_sink_ptr, head, is_row, log2_sum):
    """What the sink leaves of an output: 1 / (1 + e^(sink - lse)), and 1 where there is no key."""
    sink = tl.load(attn_sink_ptr + head, mask=is_row, other=0.0) * LOG2_E
    has_keys = log2_sum != float("-inf")
    factor = 1.0 / (1.0 + tl.exp2(sink - tl.where(has_keys, log2_sum, 0.0)))
    return tl.where(has_keys, factor, 1.0)


@triton.jit
def natural_lse(log2_sum, empty_lse):
    """The natural logarithm of the denominator; empty_lse for a row without keys."""
    return tl.where(log2_sum == float("-inf"), empty_lse, log2_sum * LN_2)


@triton.jit
def _parts_to_merge(
    cache_seqlens_ptr, candidate, b, max_seqlen, num_parts, part_tiles, max_chunks,
    SCHEDULE: tl.constexpr, BY_PART: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A request, its first part and how many it has; 0 if there is nothing to merge.

    The candidate is a request or, BY_PART, the part in which a request begins that goes on behind
    it: there is no second one.
    """
    if SCHEDULE == BALANCED:
        tiles = all_tiles(cache_seqlens_ptr, b, max_seqlen, BLOCK_B, BLOCK_N)
        first, last, part_tiles = balanced_range(
            tiles, candidate if BY_PART else 0, num_parts, part_tiles
        )
        request = tl.minimum(request_at(tiles, last - 1), b - 1) if BY_PART else candidate
        begin = tiles_before(tiles, request)
        end = begin + tiles_of(seqlen_of(cache_seqlens_ptr, request, max_seqlen), BLOCK_N)
        first_part = begin // part_tiles
        num_merged = (end - 1) // part_tiles - first_part + 1
        if BY_PART:
            num_merged = tl.where((first < last) & (first_part == candidate), num_merged, 0)
    else:
        request, first_part = candidate, candidate * max_chunks
        tiles = tiles_of(seqlen_of(cache_seqlens_ptr, candidate, max_seqlen), BLOCK_N)
        num_merged = tl.cdiv(tiles, part_tiles)
    return request, first_part, tl.where(num_merged > 1, num_merged, 0)


@triton.jit(
    do_not_specialize=[
        "row_tiles", "b", "s_q", "max_seqlen", "num_parts", "part_tiles", "max_chunks",
    ]
)  # fmt: skip
def _flash_fwd_mla_combine_kernel(
    partial_out_ptr,  # [slots, HKV * row_tiles, BLOCK_M, VALUE_DIM] fp32
    partial_lse_ptr,  # [slots, HKV * row_tiles, BLOCK_M] fp32, base 2
    cache_seqlens_ptr,
    cu_seqlens_q_ptr,
    attn_sink_ptr,
    out_ptr,
    lse_ptr,
    row_tiles,
    b,
    s_q,
    max_seqlen,
    num_parts,
    part_tiles,
    max_chunks,
    empty_lse,
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BY_PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one row (query and head) of a request that was cut."""
    pid = tl.program_id(0)
    channel_start = pid % tl.cdiv(VALUE_DIM, BLOCK_C) * BLOCK_C
    pid = pid // tl.cdiv(VALUE_DIM, BLOCK_C)
    row = pid % BLOCK_M
    tile = pid // BLOCK_M % (row_tiles * HKV)
    offs_r = tile % row_tiles * BLOCK_M + row
    query = offs_r // GROUP
    if query >= s_q:
        return
    request, first_part, num_merged = _parts_to_merge(
        cache_seqlens_ptr, pid // BLOCK_M // (row_tiles * HKV), b, max_seqlen, num_parts,
        part_tiles, max_chunks, SCHEDULE, BY_PART, BLOCK_B, BLOCK_N,
    )  # fmt: skip
    if (num_merged == 0) | (query >= num_queries_of(cu_seqlens_q_ptr, request, s_q)):
        return

    offs_c = channel_start + tl.arange(0, BLOCK_C)
    largest, total = LOWEST_LOGIT, 0.0
    out = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, num_merged, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        is_used = offs_s < num_merged
        slot = first_part + offs_s
        if SCHEDULE == BALANCED:
            slot = 2 * slot + (offs_s == 0)
        at = (slot.to(tl.int64) * (row_tiles * HKV) + tile) * BLOCK_M + row
        log2_sum = tl.load(partial_lse_ptr + at, mask=is_used, other=float("-inf"))
        partial = tl.load(
            partial_out_ptr + (at * VALUE_DIM)[:, None] + offs_c[None, :],
            mask=is_used[:, None] & (offs_c < VALUE_DIM)[None, :],
            other=0.0,
        )
        out, largest, total = merge_step(log2_sum, partial, out, largest, total)
    log2_sum, normalizer = log2_sum_of(largest, total)
    out *= normalizer
    head = tile // row_tiles * GROUP + offs_r % GROUP
    if attn_sink_ptr is not None:
        out *= sink_factor(attn_sink_ptr, head, head >= 0, log2_sum)
    at = first_query_of(cu_seqlens_q_ptr, request, s_q) + query
    at = at.to(tl.int64) * (HKV * GROUP) + head
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * VALUE_DIM + offs_c, out, mask=offs_c < VALUE_DIM)
    if channel_start == 0:
        tl.store(lse_ptr + at, natural_lse(log2_sum, empty_lse))

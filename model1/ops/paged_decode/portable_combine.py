"""Where the keys of a request are cut, and how partial results become one: Triton.

Attention over a few rows is limited by how many processors read the cache, so the keys of a
request are cut into splits. A split leaves, per row, its normalised output and the base-2
logarithm of its softmax denominator; the combine kernel weighs the outputs by the denominators.
"""

# pyright: reportMissingParameterType=none
# Only constexpr parameters of a kernel carry types.

from __future__ import annotations

import triton
import triton.language as tl

# Below every logit in use, yet finite: a row that has seen no key must not compute inf - inf.
LOWEST_LOGIT = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def keys_per_split(seqlen, num_splits, min_split_tiles, BLOCK_N: tl.constexpr):
    """Keys of one split, whole tiles: an even share of the request, at least min_split_tiles."""
    share = tl.cdiv(tl.cdiv(seqlen, BLOCK_N), num_splits)
    return tl.maximum(share, min_split_tiles) * BLOCK_N


@triton.jit
def first_query_of(cu_seqlens_q_ptr, request, s_q):
    """The request's first row in a flat list of queries."""
    if cu_seqlens_q_ptr is None:
        return request.to(tl.int64) * s_q
    else:
        return tl.load(cu_seqlens_q_ptr + request).to(tl.int64)


@triton.jit
def num_queries_of(cu_seqlens_q_ptr, request, s_q):
    """How many queries the request has."""
    if cu_seqlens_q_ptr is None:
        return s_q
    else:
        return tl.load(cu_seqlens_q_ptr + request + 1) - tl.load(cu_seqlens_q_ptr + request)


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


@triton.jit(do_not_specialize=["s_q", "max_seqlen", "num_splits", "min_split_tiles"])
def _flash_fwd_mla_combine_kernel(
    partial_out_ptr,  # [t, h, num_splits, VALUE_DIM] fp32
    partial_lse_ptr,  # [t, h, num_splits] fp32, base 2
    cache_seqlens_ptr,
    cu_seqlens_q_ptr,
    attn_sink_ptr,
    out_ptr,
    lse_ptr,
    s_q,
    max_seqlen,
    num_splits,
    min_split_tiles,
    empty_lse,
    H: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C channels of one row (query and head): the sum over the splits that have keys."""
    pid = tl.program_id(0)
    channel_start = pid % tl.cdiv(VALUE_DIM, BLOCK_C) * BLOCK_C
    pid = pid // tl.cdiv(VALUE_DIM, BLOCK_C)
    head = pid % H
    query = pid // H % s_q
    request = pid // H // s_q
    num_queries = num_queries_of(cu_seqlens_q_ptr, request, s_q)
    if query >= num_queries:
        return
    seqlen = tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + request), 0), max_seqlen)
    num_keys = seqlen - (num_queries - 1 - query) if CAUSAL else seqlen
    split_keys = keys_per_split(seqlen, num_splits, min_split_tiles, BLOCK_N)
    num_used = tl.cdiv(tl.maximum(num_keys, 0), split_keys)

    row = (first_query_of(cu_seqlens_q_ptr, request, s_q) + query) * H + head
    offs_c = channel_start + tl.arange(0, BLOCK_C)
    largest = tl.full([1], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, num_used, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        is_used = offs_s < num_used
        log2_sum = tl.load(
            partial_lse_ptr + row * num_splits + offs_s, mask=is_used, other=float("-inf")
        )
        partial = tl.load(
            partial_out_ptr + ((row * num_splits + offs_s) * VALUE_DIM)[:, None] + offs_c[None, :],
            mask=is_used[:, None] & (offs_c < VALUE_DIM)[None, :],
            other=0.0,
        )
        previous = largest
        largest = tl.maximum(previous, tl.max(log2_sum, 0))
        weight = tl.exp2(log2_sum - largest)
        decay = tl.exp2(previous - largest)
        total = total * decay + tl.sum(weight, 0)
        out = out * decay[:, None] + tl.sum(weight[:, None] * partial, 0)[None, :]
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    log2_sum = tl.where(is_empty, float("-inf"), largest + tl.log2(total))
    out = out / total[:, None]
    if attn_sink_ptr is not None:
        out *= sink_factor(attn_sink_ptr, head, head >= 0, log2_sum)[:, None]
    offs_out = row * VALUE_DIM + offs_c
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_out[None, :], out, mask=(offs_c < VALUE_DIM)[None, :])
    if channel_start == 0:
        tl.store(lse_ptr + row + tl.arange(0, 1), natural_lse(log2_sum, empty_lse))

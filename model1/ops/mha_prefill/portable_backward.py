"""Backward kernels of MHA prefill, Triton: gradients of the queries, then of keys and values.

With P = e^(scale S - lse), dP = d_out V^T, delta = sum(out d_out) and dS = P (dP - delta):

    dq = scale dS K        dk = scale dS^T Q        dv = P^T d_out

No sum crosses programs, so that gradients are the same bits every time.
"""

# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.mha_prefill.portable_forward import (
    load_rows,
    query_tile,
    request_bounds,
    store_rows,
    visible_keys,
    zero_rows,
)
from model1.ops.online_softmax import LOG2_E, add_products, scaled_pieces, scaled_scores


@triton.jit
def _weights(logits, lse, is_visible):
    """The probabilities of base-2 logits. A row with lse = -inf has only hidden keys."""
    log2_sum = tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)
    return tl.where(is_visible, tl.exp2(logits - log2_sum), 0.0)


@triton.jit(do_not_specialize=["t", "num_tiles"])
def _mha_prefill_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,  # [t, H, DV], like d_out
    d_out_ptr,
    lse_ptr,  # [H, t]
    delta_ptr,  # [H, t], written
    dq_ptr,  # [t, H, D]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    t,
    num_tiles,
    softmax_scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_PIECES: tl.constexpr,
    V_PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq and delta of one tile of queries of one head and request."""
    tile, head, request = query_tile(num_tiles, H)
    q_start, n = request_bounds(cu_seqlens_q_ptr, request)
    if tile * BLOCK_M >= n:
        return
    k_start, s = request_bounds(cu_seqlens_k_ptr, request)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = query < n
    num_keys = visible_keys(query, n, s, CAUSAL)

    k_ptr += k_start * stride_kt + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += k_start * stride_vt + (head // GROUP).to(tl.int64) * stride_vh
    offs_q = (q_start + query) * stride_qt + head.to(tl.int64) * stride_qh
    row = (q_start + query) * H + head
    column = head.to(tl.int64) * t + q_start + query
    q = load_rows(q_ptr, offs_q, is_query, K_PIECES, True)
    d_out = load_rows(d_out_ptr, row * DV, is_query, V_PIECES, True)
    out = load_rows(out_ptr, row * DV, is_query, V_PIECES, True)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(V_PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * d_out[i].to(tl.float32), 1)
    tl.store(delta_ptr + column, delta, mask=is_query)
    lse = tl.load(lse_ptr + column, mask=is_query, other=0.0)

    dq = zero_rows(BLOCK_M, K_PIECES)
    logit_scale = softmax_scale * LOG2_E
    for start in range(0, tl.max(num_keys, 0), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key.to(tl.int64) * stride_kt, key < s, K_PIECES, True)
        v = load_rows(v_ptr, key.to(tl.int64) * stride_vt, key < s, V_PIECES, True)
        is_visible = key[None, :] < num_keys[:, None]
        weights = _weights(scaled_scores(q, k, logit_scale, False), lse[:, None], is_visible)
        slope = weights * (scaled_scores(d_out, v, 1.0, False) - delta[:, None])
        dq = add_products(dq, slope.to(q[0].dtype), k)
    store_rows(dq_ptr, row * D, is_query, scaled_pieces(dq, softmax_scale), K_PIECES)


@triton.jit(do_not_specialize=["t", "num_tiles"])
def _mha_prefill_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    d_out_ptr,  # [t, H, DV]
    lse_ptr,  # [H, t]
    delta_ptr,  # [H, t]
    dk_ptr,  # [s, HKV, D]
    dv_ptr,  # [s, HKV, DV]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    t,
    num_tiles,
    softmax_scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_PIECES: tl.constexpr,
    V_PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of keys of one key head and request; products are transposed."""
    HKV: tl.constexpr = H // GROUP
    pid = tl.program_id(0)
    first_key = pid % num_tiles * BLOCK_N
    kv_head = pid // num_tiles % HKV
    request = pid // num_tiles // HKV
    k_start, s = request_bounds(cu_seqlens_k_ptr, request)
    if first_key >= s:
        return
    q_start, n = request_bounds(cu_seqlens_q_ptr, request)
    key = first_key + tl.arange(0, BLOCK_N)
    is_key = key < s
    # earlier queries see no key of this tile
    first_query = tl.maximum(first_key - s + n, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0

    offs_k = (k_start + key) * stride_kt + kv_head.to(tl.int64) * stride_kh
    offs_v = (k_start + key) * stride_vt + kv_head.to(tl.int64) * stride_vh
    k = load_rows(k_ptr, offs_k, is_key, K_PIECES, True)
    v = load_rows(v_ptr, offs_v, is_key, V_PIECES, True)
    dk = zero_rows(BLOCK_N, K_PIECES)
    dv = zero_rows(BLOCK_N, V_PIECES)
    logit_scale = softmax_scale * LOG2_E
    for i in range(GROUP):
        head = kv_head.to(tl.int64) * GROUP + i
        head_q_ptr = q_ptr + q_start * stride_qt + head * stride_qh
        head_d_out_ptr = d_out_ptr + (q_start * H + head) * DV
        column = head * t + q_start
        # nothing is kept in registers from tile to tile that can be computed again
        for start in tl.range(first_query, n, BLOCK_M, disable_licm=True):
            query = start + tl.arange(0, BLOCK_M)
            is_query = query < n
            q = load_rows(head_q_ptr, query.to(tl.int64) * stride_qt, is_query, K_PIECES, True)
            offs_d_out = query.to(tl.int64) * (H * DV)
            d_out = load_rows(head_d_out_ptr, offs_d_out, is_query, V_PIECES, True)
            lse = tl.load(lse_ptr + column + query, mask=is_query, other=0.0)
            delta = tl.load(delta_ptr + column + query, mask=is_query, other=0.0)
            is_visible = key[:, None] < visible_keys(query, n, s, CAUSAL)[None, :]
            weights = _weights(scaled_scores(k, q, logit_scale, False), lse[None, :], is_visible)
            dv = add_products(dv, weights.to(k[0].dtype), d_out)
            slope = weights * (scaled_scores(v, d_out, 1.0, False) - delta[None, :])
            dk = add_products(dk, slope.to(k[0].dtype), q)
    row = (k_start + key) * HKV + kv_head
    store_rows(dk_ptr, row * D, is_key, scaled_pieces(dk, softmax_scale), K_PIECES)
    store_rows(dv_ptr, row * DV, is_key, dv, V_PIECES)

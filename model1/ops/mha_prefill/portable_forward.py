"""Forward kernel of MHA prefill, Triton, and the device functions that it shares with the backward.

A program owns one tile of queries of one head. Channels are cut into pieces that are powers of
two and add up exactly: 192 channels are 128 + 64, not 256.
"""

# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import (
    LN_2,
    LOG2_E,
    LOWEST_LOGIT,
    attend_tile,
    log2_sum_of,
    scaled_pieces,
)


@triton.jit
def load_rows(ptr, offs_row, is_row, PIECES, IS_MASKED: tl.constexpr):
    """The rows as one [n, width] tensor per piece; absent rows and channels are zero."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        at = ptr + offs_row[:, None] + offs_c[None, :]
        if PIECES[i][0] + PIECES[i][1] > PIECES[i][2]:
            mask = is_row[:, None] & (offs_c < PIECES[i][2])[None, :]
            x += (tl.load(at, mask=mask, other=0.0),)
        elif IS_MASKED:
            x += (tl.load(at, mask=is_row[:, None], other=0.0),)
        else:
            x += (tl.load(at),)
    return x


@triton.jit
def store_rows(ptr, offs_row, is_row, x, PIECES):
    """What `load_rows` reads."""
    for i in tl.static_range(len(PIECES)):
        offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (offs_c < PIECES[i][2])[None, :]
        value = x[i].to(ptr.dtype.element_ty)
        tl.store(ptr + offs_row[:, None] + offs_c[None, :], value, mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES):
    """fp32 zeros in the form of `load_rows`."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        x += (_zeros(ROWS, PIECES[i][1]),)
    return x


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def query_tile(num_tiles, H: tl.constexpr):
    """Tile of queries, head and request of this program."""
    pid = tl.program_id(0)
    # a request's last queries see the most keys under a causal mask: they start first
    return num_tiles - 1 - pid % num_tiles, pid // num_tiles % H, pid // num_tiles // H


@triton.jit
def request_bounds(cu_seqlens_ptr, request):
    """Where a request's rows start, and how many there are."""
    start = tl.load(cu_seqlens_ptr + request).to(tl.int64)
    return start, (tl.load(cu_seqlens_ptr + request + 1) - start).to(tl.int32)


@triton.jit
def visible_keys(query, n, s, CAUSAL: tl.constexpr):
    """How many of a request's first keys each query sees: none where there is no query."""
    num_keys = s - (n - 1 - query) if CAUSAL else tl.zeros_like(query) + s
    return tl.where(query < n, num_keys, 0)


@triton.jit
def _attend(
    q, out, largest, total, k_ptr, v_ptr, stride_kt, stride_vt, first, last, num_keys, s,
    logit_scale, K_PIECES: tl.constexpr, V_PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Keys first..last, whole tiles: the running output, maximum and sum after them."""
    offs_n = tl.arange(0, BLOCK_N)
    # masks are computed again: kept from tile to tile they cost registers that are needed
    for start in tl.range(first, last, BLOCK_N, disable_licm=IS_MASKED):  # pyright: ignore
        key = start + offs_n
        is_key = key < s
        k = load_rows(k_ptr, key.to(tl.int64) * stride_kt, is_key, K_PIECES, IS_MASKED)
        v = load_rows(v_ptr, key.to(tl.int64) * stride_vt, is_key, V_PIECES, IS_MASKED)
        is_visible = key[None, :] < num_keys[:, None] if IS_MASKED else None
        out, largest, total = attend_tile(
            q, k, v, logit_scale, is_visible, out, largest, total, True, True, False
        )
    return out, largest, total


@triton.jit(do_not_specialize=["t", "num_tiles"])
def _mha_prefill_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,  # [t, H, dv]
    lse_ptr,  # [H, t]
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
    """One tile of queries of one head and request."""
    tile, head, request = query_tile(num_tiles, H)
    q_start, n = request_bounds(cu_seqlens_q_ptr, request)
    if tile * BLOCK_M >= n:
        return
    k_start, s = request_bounds(cu_seqlens_k_ptr, request)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = query < n
    num_keys = visible_keys(query, n, s, CAUSAL)
    end = tl.max(num_keys, 0)
    # keys that every row sees need no mask
    full = s - (n - 1 - tile * BLOCK_M) if CAUSAL else s
    full = tl.maximum(full, 0) // BLOCK_N * BLOCK_N

    q_ptr += q_start * stride_qt + head.to(tl.int64) * stride_qh
    k_ptr += k_start * stride_kt + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += k_start * stride_vt + (head // GROUP).to(tl.int64) * stride_vh
    q = load_rows(q_ptr, query.to(tl.int64) * stride_qt, is_query, K_PIECES, True)
    out = zero_rows(BLOCK_M, V_PIECES)
    largest = tl.full([BLOCK_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    logit_scale = softmax_scale * LOG2_E
    out, largest, total = _attend(
        q, out, largest, total, k_ptr, v_ptr, stride_kt, stride_vt, 0, full, num_keys, s,
        logit_scale, K_PIECES, V_PIECES, BLOCK_N, False,
    )  # fmt: skip
    out, largest, total = _attend(
        q, out, largest, total, k_ptr, v_ptr, stride_kt, stride_vt, full, end, num_keys, s,
        logit_scale, K_PIECES, V_PIECES, BLOCK_N, True,
    )  # fmt: skip

    log2_sum, normalizer = log2_sum_of(largest, total)
    row = (q_start + query) * H + head
    tl.store(lse_ptr + head.to(tl.int64) * t + q_start + query, log2_sum * LN_2, mask=is_query)
    store_rows(out_ptr, row * DV, is_query, scaled_pieces(out, normalizer[:, None]), V_PIECES)

"""The main kernel of paged decode: one tile of rows over one split of a request's keys, Triton.

The rows of a tile are (query, head) pairs that share a key head: row r is head r % GROUP of query
r // GROUP, so that any head count fills the tile. Channels are cut into pieces, each with an
accumulator of its own: one wide accumulator would not stay in registers. A piece of keys is
loaded once and serves both products.
"""

# pyright: reportMissingParameterType=none
# Only constexpr parameters of a kernel carry types.

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.kv_cache.bits import e4m3_to_fp32, e8m0_to_fp32
from model1.ops.paged_decode.portable_combine import (
    LOG2_E,
    LOWEST_LOGIT,
    first_query_of,
    keys_per_split,
    natural_lse,
    num_queries_of,
    sink_factor,
)


@triton.jit
def _block_ids(table_ptr, start, offs_n, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of the tile of keys at `start`: one for all if the tile lies in one block."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        keys = start + offs_n
        return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)


@triton.jit
def _rows(
    ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Elements START.. of the tile's rows, [BLOCK_N, WIDTH]; zeros past END and for absent keys."""
    offs_c = START + tl.arange(0, WIDTH)
    offs_row = block_ids.to(tl.int64) * stride_block + offs.to(tl.int64) * STRIDE_ROW
    mask = is_key[:, None]
    if START + WIDTH > END:
        mask = mask & (offs_c < END)[None, :]
    return tl.load(ptr + offs_row[:, None] + offs_c[None, :], mask=mask, other=0)


@triton.jit
def _scales(
    ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW: tl.constexpr,
    START: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The fp32 scales START.. of the tile's rows, [BLOCK_N, COUNT]."""
    if ptr.dtype.element_ty == tl.int32:
        # four e8m0 bytes a word; single bytes could not be copied ahead of their use
        WORD: tl.constexpr = START // 4
        word = _rows(ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW, WORD, 1, WORD + 1)
        shift = (START % 4 + tl.arange(0, COUNT)) * 8
        return e8m0_to_fp32((word >> shift[None, :]) & 0xFF)
    else:
        return _rows(
            ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW, START, COUNT, START + COUNT
        )


@triton.jit
def _dequantize(codes, scales, HAS_FP8: tl.constexpr):
    """e4m3 codes [n, w] times scales [n, m], each of which belongs to w / m channels."""
    if HAS_FP8:
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        x = e4m3_to_fp32(codes)
    WIDTH: tl.constexpr = codes.shape[1] // scales.shape[1]
    x = tl.reshape(x, [codes.shape[0], scales.shape[1], WIDTH]) * scales[:, :, None]
    return tl.reshape(x, codes.shape)


@triton.jit
def _keys(
    kv_ptr, rope_ptr, scale_ptr, block_ids, offs, is_key, stride_block,
    STRIDE_ROW: tl.constexpr, STRIDE_ROPE_ROW: tl.constexpr, STRIDE_SCALE_ROW: tl.constexpr,
    D_NOPE: tl.constexpr, TILE: tl.constexpr, HAS_FP8: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """One piece of the tile's keys, [BLOCK_N, WIDTH]."""
    if scale_ptr is None:
        return _rows(kv_ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW, START, WIDTH, END)
    elif START < D_NOPE:
        codes = _rows(kv_ptr, block_ids, offs, is_key, stride_block, STRIDE_ROW, START, WIDTH, END)
        scales = _scales(
            scale_ptr, block_ids, offs, is_key, stride_block // 4, STRIDE_SCALE_ROW,
            START // TILE, WIDTH // TILE,
        )  # fmt: skip
        return _dequantize(codes, scales, HAS_FP8)
    else:
        return _rows(
            rope_ptr, block_ids, offs, is_key, stride_block // 2, STRIDE_ROPE_ROW,
            START - D_NOPE, WIDTH, END - D_NOPE,
        )  # fmt: skip


# These change from call to call: a kernel for each kind of number would be compiled in mid-service.
@triton.jit(
    do_not_specialize=[
        "stride_table", "row_tiles", "s_q", "max_seqlen", "num_splits", "min_split_tiles",
    ]
)  # fmt: skip
def _flash_fwd_splitkv_mla_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,  # 8-bit caches: the first token's rotary channels, bf16; else None
    scale_ptr,  # 8-bit caches: the first token's scales, fp32 or e8m0 bytes; else None
    block_table_ptr,
    cache_seqlens_ptr,
    cu_seqlens_q_ptr,
    attn_sink_ptr,
    out_ptr,  # [t, h, VALUE_DIM], or partial results as the combine kernel reads them
    lse_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_block,
    stride_head,
    stride_table,
    row_tiles,
    softmax_scale,
    s_q,
    max_seqlen,
    num_splits,
    min_split_tiles,
    empty_lse,
    D_NOPE: tl.constexpr,  # 8-bit channels
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    STRIDE_ROPE_ROW: tl.constexpr,
    STRIDE_SCALE_ROW: tl.constexpr,
    PIECES: tl.constexpr,  # (first channel, width, end) of each piece
    NUM_VALUE_PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows over the keys of one split."""
    pid = tl.program_id(0)
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    kv_head = pid % HKV
    split = pid // HKV % num_splits
    request = pid // HKV // num_splits
    first_query = first_query_of(cu_seqlens_q_ptr, request, s_q)
    num_queries = num_queries_of(cu_seqlens_q_ptr, request, s_q)
    if row_tile * BLOCK_M >= num_queries * GROUP:
        return

    offs_r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = offs_r // GROUP
    head = kv_head * GROUP + offs_r % GROUP
    is_row = query < num_queries
    seqlen = tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + request), 0), max_seqlen)
    start = split * keys_per_split(seqlen, num_splits, min_split_tiles, BLOCK_N)
    end = start + keys_per_split(seqlen, num_splits, min_split_tiles, BLOCK_N)
    if CAUSAL:
        last_query = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
        end = tl.minimum(end, seqlen - (num_queries - 1 - last_query))
        num_keys = tl.minimum(seqlen - (num_queries - 1 - query), end)
    else:
        end = tl.minimum(end, seqlen)
    if IS_SPLIT and start >= end:
        return

    if cu_seqlens_q_ptr is None:
        q_ptr += request.to(tl.int64) * stride_qb
    else:
        q_ptr += first_query * stride_qs
    offs_q = query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    q = ()
    out = ()
    for i in tl.static_range(len(PIECES)):
        offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (offs_c < PIECES[i][2])[None, :]
        q += (tl.load(q_ptr + offs_q[:, None] + offs_c[None, :], mask=mask, other=0.0),)
        if i < NUM_VALUE_PIECES:
            out += (tl.zeros(q[i].shape, tl.float32),)

    offs_n = tl.arange(0, BLOCK_N)
    kv_ptr += kv_head.to(tl.int64) * stride_head
    table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
    logit_scale = softmax_scale * LOG2_E
    largest = tl.full([BLOCK_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    block_ids = _block_ids(table_ptr, start, offs_n, end, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        is_key = n + offs_n < end
        offs = (n + offs_n) % BLOCK_SIZE
        k = ()
        for i in tl.static_range(len(PIECES)):
            piece = _keys(
                kv_ptr, rope_ptr, scale_ptr, block_ids, offs, is_key, stride_block,
                STRIDE_ROW, STRIDE_ROPE_ROW, STRIDE_SCALE_ROW, D_NOPE, TILE, HAS_FP8,
                PIECES[i][0], PIECES[i][1], PIECES[i][2],
            )  # fmt: skip
            k += (piece.to(COMPUTE),)
        # the next tile's blocks are on their way while this one is used
        block_ids = _block_ids(table_ptr, n + BLOCK_N, offs_n, end, BLOCK_SIZE, BLOCK_N)

        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(len(PIECES)):
            logits = tl.dot(q[i], tl.trans(k[i]), acc=logits, input_precision="ieee")
        is_visible = (n + offs_n)[None, :] < num_keys[:, None] if CAUSAL else is_key[None, :]
        logits = tl.where(is_visible, logits * logit_scale, float("-inf"))
        previous = largest
        largest = tl.maximum(previous, tl.max(logits, 1))
        weights = tl.exp2(logits - largest[:, None])
        decay = tl.exp2(previous - largest)
        total = total * decay + tl.sum(weights, 1)
        weights = weights.to(COMPUTE)
        updated = ()
        for i in tl.static_range(NUM_VALUE_PIECES):
            kept = out[i] * decay[:, None]
            updated += (tl.dot(weights, k[i], acc=kept, input_precision="ieee"),)
        out = updated

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    log2_sum = tl.where(is_empty, float("-inf"), largest + tl.log2(total))
    normalizer = 1.0 / total
    row = (first_query + query) * (HKV * GROUP) + head
    if IS_SPLIT:
        row = row * num_splits + split
        tl.store(lse_ptr + row, log2_sum, mask=is_row)
    else:
        tl.store(lse_ptr + row, natural_lse(log2_sum, empty_lse), mask=is_row)
    for i in tl.static_range(NUM_VALUE_PIECES):
        offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (offs_c < min(PIECES[i][2], VALUE_DIM))[None, :]
        result = out[i] * normalizer[:, None]
        if attn_sink_ptr is not None and not IS_SPLIT:
            result *= sink_factor(attn_sink_ptr, head, is_row, log2_sum)[:, None]
        result = result.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * VALUE_DIM)[:, None] + offs_c[None, :], result, mask=mask)

"""The main kernel of paged decode: one tile of rows over one part of the keys, Triton.

The rows of a tile are (query, head) pairs that share a key head: row r is head r % GROUP of query
r // GROUP, so that any head count fills the tile. Channels are cut into pieces, each with an
accumulator of its own: one wide accumulator would not stay in registers. A piece of keys is
loaded once and serves both products.
"""

# Only constexpr parameters of a kernel carry types; loops over tl.static_range exist only when
# compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.kv_cache.bits import e4m3_to_fp32, e8m0_to_fp32
from model1.ops.online_softmax import LOG2_E, LOWEST_LOGIT, attend_tile, log2_sum_of
from model1.ops.paged_decode.portable_combine import natural_lse, sink_factor
from model1.ops.paged_decode.portable_schedule import (
    BALANCED,
    FIXED,
    WHOLE,
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


@triton.jit
def _store(
    out_ptr, out, factor, row, is_row, VALUE_DIM: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """out * factor, piece by piece, to rows of VALUE_DIM channels."""
    for i in tl.static_range(len(out)):
        offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (offs_c < min(PIECES[i][2], VALUE_DIM))[None, :]
        result = (out[i] * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * VALUE_DIM)[:, None] + offs_c[None, :], result, mask=mask)


@triton.jit
def _attend(
    q, kv_ptr, rope_ptr, scale_ptr, table_ptr, stride_block, start, end, first_row, num_keys,
    logit_scale, GROUP: tl.constexpr, D_NOPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, STRIDE_ROW: tl.constexpr, STRIDE_ROPE_ROW: tl.constexpr,
    STRIDE_SCALE_ROW: tl.constexpr, PIECES: tl.constexpr, NUM_VALUE_PIECES: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_FP8: tl.constexpr, COMPUTE: tl.constexpr,
    SPLIT_SCORES: tl.constexpr, IS_TIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys start <= n < end: the sum of weighted values per piece, the maximum, the sum of weights.

    With CAUSAL row r, counted from first_row, sees the first num_keys + r // GROUP of them only.
    """
    out = ()
    for i in tl.static_range(NUM_VALUE_PIECES):
        out += (tl.zeros(q[i].shape, tl.float32),)
    offs_n = tl.arange(0, BLOCK_N)
    largest = tl.full([BLOCK_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    block_ids = _block_ids(table_ptr, start, offs_n, end, BLOCK_SIZE, BLOCK_N)
    for n in tl.range(start, end, BLOCK_N, disable_licm=IS_TIGHT):
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
        is_visible = is_key[None, :]
        if CAUSAL:
            # unsigned, so that the compiler sees rows of one query and keeps a number for all
            query = (first_row + tl.arange(0, BLOCK_M)).to(tl.uint32) // GROUP
            row_keys = num_keys + query.to(tl.int32)
            is_visible = (n + offs_n)[None, :] < tl.minimum(row_keys, end)[:, None]
        out, largest, total = attend_tile(
            q, k, k, logit_scale, is_visible, out, largest, total, n < end, start < end,
            SPLIT_SCORES,
        )  # fmt: skip
    return out, largest, total


@triton.jit
def _finish(
    out, largest, total, is_whole, slot, tile, row_tiles, request, zero, s_q, empty_lse,
    cu_seqlens_q_ptr, attn_sink_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
    VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, HKV: tl.constexpr, SCHEDULE: tl.constexpr,
    BLOCK_M: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Write a tile of rows: the result if is_whole, else what the combine kernel reads.

    zero: 0, which the compiler must not know. What the rows are is computed with it once more:
    kept from before the loop over the keys, where registers are scarcest, it would spill.
    """
    offs_r = tile % row_tiles * BLOCK_M + zero + tl.arange(0, BLOCK_M)
    query = offs_r // GROUP
    head = tile // row_tiles * GROUP + offs_r % GROUP
    is_row = query < num_queries_of(cu_seqlens_q_ptr, request + zero, s_q)
    log2_sum, normalizer = log2_sum_of(largest, total)
    if is_whole:
        first_query = first_query_of(cu_seqlens_q_ptr, request + zero, s_q)
        row = (first_query + query) * (HKV * GROUP) + head
        tl.store(lse_ptr + row, natural_lse(log2_sum, empty_lse), mask=is_row)
        if attn_sink_ptr is not None:
            normalizer *= sink_factor(attn_sink_ptr, head, is_row, log2_sum)
        _store(out_ptr, out, normalizer, row, is_row, VALUE_DIM, PIECES)
    elif SCHEDULE != WHOLE:
        row = (slot.to(tl.int64) * (row_tiles * HKV) + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_lse_ptr + row, log2_sum, mask=is_row)
        _store(partial_out_ptr, out, normalizer, row, is_row, VALUE_DIM, PIECES)


# These change from call to call: a kernel for each kind of number would be compiled in mid-service.
@triton.jit(
    do_not_specialize=[
        "stride_table", "row_tiles", "b", "s_q", "max_seqlen", "num_parts", "part_tiles",
        "max_chunks",
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
    out_ptr,  # [t, h, VALUE_DIM]
    lse_ptr,
    partial_out_ptr,  # as the combine kernel reads them; None if every part is whole
    partial_lse_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_block,
    stride_head,
    stride_table,
    row_tiles,
    softmax_scale,
    b,
    s_q,
    max_seqlen,
    num_parts,
    part_tiles,  # of a part: the least (BALANCED) or all (FIXED)
    max_chunks,
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
    SCHEDULE: tl.constexpr,
    HAS_FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    SPLIT_SCORES: tl.constexpr,  # see `attend_tile`
    IS_TIGHT: tl.constexpr,  # see `Config`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One tile of rows over one part of the keys."""
    tile = tl.program_id(0) % (row_tiles * HKV)
    part = tl.program_id(0) // (row_tiles * HKV)
    first, last = part * 0, part_tiles
    if SCHEDULE == BALANCED:
        tiles = all_tiles(cache_seqlens_ptr, b, max_seqlen, BLOCK_B, BLOCK_N)
        first, last, _ = balanced_range(tiles, part, num_parts, part_tiles)
        if first >= last:
            return
        first_request, last_request = request_at(tiles, first), request_at(tiles, last - 1)
        first -= tiles_before(tiles, first_request)
        last -= tiles_before(tiles, first_request)
    else:
        first_request = part // max_chunks
        last_request = first_request
        if SCHEDULE == FIXED:
            first = part % max_chunks * part_tiles
            last = first + part_tiles

    first_row = tile % row_tiles * BLOCK_M
    if HKV > 1:
        kv_ptr += (tile // row_tiles).to(tl.int64) * stride_head
    for index in tl.range(first_request, last_request + 1, disable_licm=IS_TIGHT):  # pyright: ignore
        request = tl.full([], index, tl.int32)  # the interpreter counts in Python's integers
        num_queries = num_queries_of(cu_seqlens_q_ptr, request, s_q)
        seqlen = seqlen_of(cache_seqlens_ptr, request, max_seqlen)
        request_tiles = tiles_of(seqlen, BLOCK_N)
        first_tile = first
        last_tile = request_tiles if SCHEDULE == WHOLE else tl.minimum(last, request_tiles)
        is_whole = (first_tile == 0) & (last_tile == request_tiles)
        if (first_tile < last_tile) & (first_row < num_queries * GROUP):
            offs_r = first_row + tl.arange(0, BLOCK_M)
            query = offs_r // GROUP
            head = tile // row_tiles * GROUP + offs_r % GROUP
            is_row = query < num_queries
            start, end = first_tile * BLOCK_N, tl.minimum(last_tile * BLOCK_N, seqlen)
            num_keys = seqlen - (num_queries - 1)  # of the first query
            if CAUSAL:
                last_query = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_queries - 1)
                end = tl.minimum(end, num_keys + last_query)
            if cu_seqlens_q_ptr is None:
                q_rows = q_ptr + request.to(tl.int64) * stride_qb
            else:
                q_rows = q_ptr + first_query_of(cu_seqlens_q_ptr, request, s_q) * stride_qs
            offs_q = query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
            q = ()
            for i in tl.static_range(len(PIECES)):
                offs_c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
                mask = is_row[:, None] & (offs_c < PIECES[i][2])[None, :]
                q += (tl.load(q_rows + offs_q[:, None] + offs_c[None, :], mask=mask, other=0.0),)
            table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
            out, largest, total = _attend(
                q, kv_ptr, rope_ptr, scale_ptr, table_ptr, stride_block, start, end, first_row,
                num_keys, softmax_scale * LOG2_E, GROUP, D_NOPE, BLOCK_SIZE, TILE, STRIDE_ROW,
                STRIDE_ROPE_ROW, STRIDE_SCALE_ROW, PIECES, NUM_VALUE_PIECES, CAUSAL, HAS_FP8,
                COMPUTE, SPLIT_SCORES, IS_TIGHT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            slot = 2 * part + (first_tile == 0) if SCHEDULE == BALANCED else part
            _finish(
                out, largest, total, is_whole, slot, tile, row_tiles, request,
                tl.minimum(max_seqlen, 0), s_q, empty_lse, cu_seqlens_q_ptr, attn_sink_ptr,
                out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, VALUE_DIM, GROUP, HKV,
                SCHEDULE, BLOCK_M, PIECES,
            )  # fmt: skip
        if SCHEDULE == BALANCED:
            first, last = first * 0, last - request_tiles

# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Run-time parameters of a Triton kernel have no Python type, loops over tl.static_range exist only
# when compiled.
"""The kernels of sparse decode in Triton: attention over a split of the keys, and the merge.

Their names are what profilers and FlashMLA's own tests look for. A third measures the lists first
where bits must not depend on their padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import LN_2, LOG2_E, LOWEST_LOGIT, attend_tile, merge_step
from model1.ops.sparse_decode.portable_row import (
    load_piece,
    num_pieces,
    piece_channels,
    piece_start,
    piece_width,
    row_addresses,
)

# Splits of one step of the merge.
_STEP = tl.constexpr(8)


@triton.jit
def _num_keys(lists, length_ptr, topk):
    """How many entries of a list count; `lists`: how many lengths come before its own."""
    if length_ptr is not None:
        topk = tl.minimum(tl.maximum(tl.load(length_ptr + lists), 0), topk)
    return topk


@triton.jit
def _load_slots(
    tile, main_tiles, slots_ptr, num_keys, extra_slots_ptr, extra_num_keys, BLOCK_N: tl.constexpr
):
    """The slots of a tile; -1 behind the end of its list."""
    if extra_slots_ptr is not None:
        is_extra = tile >= main_tiles
        tile = tl.where(is_extra, tile - main_tiles, tile)
        slots_ptr = tl.where(is_extra, extra_slots_ptr, slots_ptr)
        num_keys = tl.where(is_extra, extra_num_keys, num_keys)
    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(slots_ptr + position, mask=position < num_keys, other=-1)


@triton.jit
def weight_and_lse(row_max, row_sum, sink_ptr, head, is_head):
    """What the sum of p v is multiplied with, and the lse, base 2; the sink joins only the first.

    row_sum is the sum of 2^(exponent - row_max). Without a key: 0 and -inf.
    """
    is_empty = row_sum == 0.0
    lse = tl.where(is_empty, float("-inf"), row_max + tl.log2(tl.where(is_empty, 1.0, row_sum)))
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=is_head, other=0.0)
        row_sum += tl.exp2(sink * LOG2_E - tl.where(is_empty, 0.0, row_max))
    return tl.where(is_empty, 0.0, 1.0 / tl.where(is_empty, 1.0, row_sum)), lse


@triton.jit
def store_lse(lse_ptr, lse, is_head, empty_lse):
    """A base-2 lse as a natural one."""
    lse = tl.where(lse == float("-inf"), empty_lse, lse * LN_2)
    tl.store(lse_ptr, lse, mask=is_head)


@triton.jit
def _store_pieces(out_ptr, acc, weight, head, is_head, ROW: tl.constexpr, VALUE_DIM: tl.constexpr):
    """acc * weight to out [h, VALUE_DIM]."""
    for piece in tl.static_range(num_pieces(ROW, VALUE_DIM)):
        channel = piece_channels(ROW, piece)
        at = (head * VALUE_DIM)[:, None] + channel[None, :]
        mask = is_head[:, None] & (channel < VALUE_DIM)[None, :]
        out = (acc[piece] * weight[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=mask)


# Nothing is gained from specialising these, and each distinct 1 or multiple of 16 would compile.
_SIZES = [
    "num_rows", "s_q", "rows_per_length", "h", "topk", "extra_topk", "split_tiles",
    "stride_slots_b", "stride_slots_s", "stride_extra_b", "stride_extra_s",
    "block_units", "block_size", "divisor", "shift", "last_slot",
    "extra_units", "extra_size", "extra_divisor", "extra_shift", "extra_last",
]  # fmt: skip


@triton.jit
def _end_of_list(slots_ptr, num_keys, last_slot, BLOCK: tl.constexpr):
    """How many of the first num_keys entries are left without the invalid ones at the end."""
    end = 0
    for first in range(0, num_keys, BLOCK):
        position = first + tl.arange(0, BLOCK)
        slot = tl.load(slots_ptr + position, mask=position < num_keys, other=-1)
        is_valid = slot.to(tl.uint32) <= last_slot.to(tl.uint32)
        end = tl.maximum(end, tl.max(tl.where(is_valid, position + 1, 0), 0))
    return end


@triton.jit(do_not_specialize=_SIZES)
def _sparse_list_lengths_kernel(
    lengths_ptr, slots_ptr, length_ptr, extra_slots_ptr, extra_length_ptr,
    num_rows, s_q, topk, extra_topk,
    stride_slots_b, stride_slots_s, stride_extra_b, stride_extra_s, last_slot, extra_last,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """lengths [2, num_rows]: how far a row's two lists reach, up to their last valid entries.

    Tiles are counted from these where bits must not depend on how far a list is padded.
    """
    row = tl.program_id(0).to(tl.int64)
    request, query = row // s_q, row % s_q
    slots_ptr += request * stride_slots_b + query * stride_slots_s
    num_keys = _num_keys(request, length_ptr, topk)
    tl.store(lengths_ptr + row, _end_of_list(slots_ptr, num_keys, last_slot, BLOCK))
    if extra_slots_ptr is not None:
        extra_slots_ptr += request * stride_extra_b + query * stride_extra_s
        num_keys = _num_keys(request, extra_length_ptr, extra_topk)
        end = _end_of_list(extra_slots_ptr, num_keys, extra_last, BLOCK)
        tl.store(lengths_ptr + num_rows + row, end)


@triton.jit(do_not_specialize=_SIZES)
def _flash_fwd_splitkv_mla_fp8_sparse_kernel(
    q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr,
    kv_ptr, slots_ptr, length_ptr, extra_kv_ptr, extra_slots_ptr, extra_length_ptr,
    num_rows, s_q, rows_per_length, h, topk, extra_topk, split_tiles, scale_log2, empty_lse,
    stride_q_b, stride_q_s, stride_q_h,
    stride_slots_b, stride_slots_s, stride_extra_b, stride_extra_s,
    block_units, block_size, divisor, shift, last_slot,
    extra_units, extra_size, extra_divisor, extra_shift, extra_last,
    ROW: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_SCORES: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one query over `split_tiles` tiles of BLOCK_N keys of its two lists.

    A row that fits one split is finished here; others leave partial results [split, row, h]: the
    attention over the split's keys and its lse, base 2. rows_per_length: s_q where the rows of a
    request share a length, 1 where each has its own.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    # Head tiles of a query are neighbours, so that the second finds the keys in the L2 cache.
    # Splits come last: those that turn out empty run when the others are under way.
    head_tiles = tl.cdiv(h, BLOCK_H)
    program = tl.program_id(0)
    row = program // head_tiles % num_rows
    split = program // head_tiles // num_rows
    request, query = (row // s_q).to(tl.int64), (row % s_q).to(tl.int64)
    num_keys = _num_keys(row // rows_per_length, length_ptr, topk)
    main_tiles = tl.cdiv(num_keys, BLOCK_N)
    num_tiles = main_tiles
    extra_num_keys = 0
    if extra_kv_ptr is not None:
        extra_num_keys = _num_keys(row // rows_per_length, extra_length_ptr, extra_topk)
        num_tiles += tl.cdiv(extra_num_keys, BLOCK_N)
        extra_slots_ptr += request * stride_extra_b + query * stride_extra_s
    first_tile = split * split_tiles
    if (split > 0) & (first_tile >= num_tiles):
        return
    last_tile = tl.minimum(first_tile + split_tiles, num_tiles)

    head = program % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < h
    q_ptr += request * stride_q_b + query * stride_q_s
    q, acc = (), ()
    for piece in tl.static_range(num_pieces(ROW)):
        at = (head.to(tl.int64) * stride_q_h)[:, None] + piece_channels(ROW, piece)[None, :]
        q += (tl.load(q_ptr + at, mask=is_head[:, None], other=0.0),)
        if piece_start(ROW, piece) < VALUE_DIM:
            acc += (tl.zeros([BLOCK_H, piece_width(ROW, piece)], tl.float32),)
    row_max = tl.full([BLOCK_H], LOWEST_LOGIT, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)

    slots_ptr += request * stride_slots_b + query * stride_slots_s
    slot = _load_slots(
        first_tile, main_tiles, slots_ptr, num_keys, extra_slots_ptr, extra_num_keys, BLOCK_N
    )
    # nothing is kept in registers from tile to tile that can be computed again
    for tile in tl.range(first_tile, last_tile, disable_licm=SPLIT_SCORES):
        tile_ptr, tile_units, tile_size = kv_ptr, block_units, block_size
        tile_divisor, tile_shift, tile_last = divisor, shift, last_slot
        if extra_kv_ptr is not None:
            is_extra = tile >= main_tiles
            tile_ptr = tl.where(is_extra, extra_kv_ptr, kv_ptr)
            tile_units = tl.where(is_extra, extra_units, block_units)
            tile_size = tl.where(is_extra, extra_size, block_size)
            tile_divisor = tl.where(is_extra, extra_divisor, divisor)
            tile_shift = tl.where(is_extra, extra_shift, shift)
            tile_last = tl.where(is_extra, extra_last, last_slot)
        # without their sign, negative slots are beyond the last one as well
        is_valid = slot.to(tl.uint32) <= tile_last.to(tl.uint32)
        address, scale_word = row_addresses(
            slot, tile_units, tile_size, tile_divisor, tile_shift, ROW
        )
        # A tile ahead: the copies of the next tile's rows, which the compiler starts while this
        # tile is worked on, need the slots.
        slot = _load_slots(
            tile + 1, main_tiles, slots_ptr, num_keys, extra_slots_ptr, extra_num_keys, BLOCK_N
        )
        # Keys are values: each piece is dequantised once, for both products.
        kv = ()
        for piece in tl.static_range(num_pieces(ROW)):
            k = load_piece(tile_ptr, address, scale_word, is_valid, ROW, piece, NATIVE_FP8, DTYPE)
            kv += (k,)
        acc, row_max, row_sum = attend_tile(
            q, kv, kv, scale_log2, is_valid[None, :], acc, row_max, row_sum, tile < last_tile,
            first_tile < last_tile, SPLIT_SCORES,
        )  # fmt: skip

    if SPLIT_SCORES:
        # Computed again, with a 0 that the compiler does not know: kept from before the loop, where
        # registers are scarcest, it would spill.
        head = program % head_tiles * BLOCK_H + tl.minimum(split_tiles, 0) + tl.arange(0, BLOCK_H)
        is_head = head < h
    row_head = row.to(tl.int64) * h
    if num_tiles <= split_tiles:
        weight, lse = weight_and_lse(row_max, row_sum, sink_ptr, head, is_head)
        store_lse(lse_ptr + row_head + head, lse, is_head, empty_lse)
        _store_pieces(out_ptr + row_head * VALUE_DIM, acc, weight, head, is_head, ROW, VALUE_DIM)
    else:
        weight, lse = weight_and_lse(row_max, row_sum, None, head, is_head)
        row_head += split.to(tl.int64) * num_rows * h
        tl.store(partial_lse_ptr + row_head + head, lse, mask=is_head)
        partial_ptr += row_head * VALUE_DIM
        _store_pieces(partial_ptr, acc, weight, head, is_head, ROW, VALUE_DIM)


@triton.jit(do_not_specialize=_SIZES)
def _flash_fwd_mla_combine_kernel(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr, length_ptr, extra_length_ptr,
    num_rows, rows_per_length, h, topk, extra_topk, split_tiles, empty_lse,
    VALUE_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one query: the partial results of its splits, each weighted with 2^lse."""
    row_head = tl.program_id(0).to(tl.int64)
    lists, head = row_head // h // rows_per_length, row_head % h
    num_tiles = tl.cdiv(_num_keys(lists, length_ptr, topk), BLOCK_N)
    num_tiles += tl.cdiv(_num_keys(lists, extra_length_ptr, extra_topk), BLOCK_N)
    num_splits = tl.cdiv(num_tiles, split_tiles)
    if num_splits <= 1:
        return  # the split kernel has written the result
    channel = tl.arange(0, BLOCK_C)
    row_max, row_sum = LOWEST_LOGIT, 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, num_splits, _STEP):
        split = first + tl.arange(0, _STEP)
        at = split.to(tl.int64) * num_rows * h + row_head
        lse = tl.load(partial_lse_ptr + at, mask=split < num_splits, other=float("-inf"))
        mask = (split < num_splits)[:, None] & (channel < VALUE_DIM)[None, :]
        partial = tl.load(
            partial_ptr + (at * VALUE_DIM)[:, None] + channel[None, :], mask=mask, other=0.0
        )
        acc, row_max, row_sum = merge_step(lse, partial, acc, row_max, row_sum)
    weight, lse = weight_and_lse(row_max, row_sum, sink_ptr, head, head < h)
    store_lse(lse_ptr + row_head, lse, head < h, empty_lse)
    out = (acc * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_head * VALUE_DIM + channel, out, mask=channel < VALUE_DIM)

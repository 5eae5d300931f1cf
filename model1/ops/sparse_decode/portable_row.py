# pyright: reportMissingParameterType=none
# Parameters of Triton functions have no Python type. ROW is a `RowFormat`, at compile time.
"""Reading cached token rows piece by piece, whatever their layout: Triton device functions.

A piece is at most 128 neighbouring channels, a power of two; in an 8-bit row it lies on one side of
the border between plain and rotary channels. Whole rows at once would be tiles that spill
registers.

In tiles of 16 keys a piece has one scale: joined from two tiles of channels it gave right scores
and wrong sums of values on an H200 with Triton 3.6, 2026-12-01, for every number of warps and heads
that was tried; tiles of 32 keys are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.bits import e4m3_to_fp32, e8m0_to_fp32

UNIT_BYTES = 16  # rows start at multiples of this, for 16-byte loads
_UNIT = tl.constexpr(UNIT_BYTES)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A `KVLayout` with its numbers written out, as a compile-time constant of a kernel.

    Triton's cache of compiled kernels knows such a constant by its repr, which therefore has to
    show all that the code depends on.
    """

    layout: str
    d_nope: int
    d_rope: int
    row_bytes: int
    rope_start_bytes: int
    scale_row_bytes: int
    tile: int
    widest_piece: int

    @classmethod
    def of(cls, layout: KVLayout, block_n: int) -> RowFormat:
        """The numbers of a layout, read in tiles of block_n keys."""
        widest = min(128, layout.tile) if layout.is_fp8 and block_n < 32 else 128
        return cls(
            layout.name, layout.d_nope, layout.d_rope, layout.row_bytes,
            layout.rope_start_bytes, layout.scale_row_bytes, layout.tile, widest,
        )  # fmt: skip


@triton.constexpr_function
def _pieces(row_format):
    """(first channel, width) of every piece."""
    pieces, start, d = [], 0, row_format.d_nope + row_format.d_rope
    for end in (row_format.d_nope, d) if row_format.layout.endswith("_fp8") else (d,):
        while start < end:
            width = min(row_format.widest_piece, 1 << ((end - start).bit_length() - 1))
            pieces.append((start, width))
            start += width
    return pieces


@triton.constexpr_function
def num_pieces(row_format, end=None):
    """Pieces of a row; only those that begin below channel `end`, if given."""
    return sum(end is None or start < end for start, _ in _pieces(row_format))


@triton.constexpr_function
def piece_start(row_format, piece):
    """First channel of a piece."""
    return _pieces(row_format)[piece][0]


@triton.constexpr_function
def piece_width(row_format, piece):
    """Channels of a piece."""
    return _pieces(row_format)[piece][1]


@triton.jit
def piece_channels(ROW, PIECE: tl.constexpr):
    """The channel numbers of a piece."""
    return piece_start(ROW, PIECE) + tl.arange(0, piece_width(ROW, PIECE))


@triton.jit
def row_addresses(slot, block_units, block_size, divisor, shift, ROW):
    """Where the tokens at `slot` keep their rows, in units, and their scale bytes, in 8-byte words.

    slot // block_size is the high half of a product: `divisor` and `shift` as `fast_divisor`
    returns them. A slot outside the cache gives an address that must not be read.
    """
    product = tl.umulhi(slot.to(tl.uint32) * 2, divisor.to(tl.uint32))
    block = (product >> shift).to(tl.int32)
    offset = slot - block * block_size
    ROW_UNITS: tl.constexpr = ROW.row_bytes // _UNIT
    first_row = block.to(tl.int64) * block_units
    plane = (first_row + block_size.to(tl.int64) * ROW_UNITS) * (_UNIT // 8)
    row = first_row + offset.to(tl.int64) * ROW_UNITS
    return row, plane + offset.to(tl.int64) * (ROW.scale_row_bytes // 8)


@triton.constexpr_function
def _tile_width(row_format):
    return row_format.tile


@triton.jit
def _load_tile(
    kv_ptr, row, scale_word, is_valid, ROW, START: tl.constexpr,
    NATIVE_FP8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The codes that share a scale, from channel START: multiplied in fp32, rounded once."""
    TILE: tl.constexpr = START // ROW.tile
    channel = START + tl.arange(0, _tile_width(ROW))
    mask = is_valid[:, None]
    code = tl.load(kv_ptr + (row * _UNIT)[:, None] + channel[None, :], mask=mask, other=0)
    if ROW.layout == "v32_fp8":
        scale_ptr = kv_ptr.to(tl.pointer_type(tl.float32)) + (ROW.d_nope // 4 + TILE)
        scale = tl.load(scale_ptr + row * (_UNIT // 4), mask=is_valid, other=0.0)[:, None]
    else:
        # a byte of a 64-bit word, because loads of fewer than 4 bytes are not pipelined
        word_ptr = kv_ptr.to(tl.pointer_type(tl.int64)) + (scale_word + TILE // 8)
        word = tl.load(word_ptr, mask=is_valid, other=0) >> (TILE % 8 * 8)
        scale = e8m0_to_fp32((word.to(tl.int32) & 0xFF)[:, None])
    # changes no result; without it Triton 3.6 does not pipeline the codes for mma.sync
    scale = tl.where(mask, scale, 0.0)
    if NATIVE_FP8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = e4m3_to_fp32(code)
    return (value * scale).to(DTYPE)


@triton.jit
def load_piece(
    kv_ptr, row, scale_word, is_valid, ROW, PIECE: tl.constexpr,
    NATIVE_FP8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One piece of the rows, [BLOCK_N, width] in DTYPE; zeros where not is_valid.

    kv_ptr: uint8; row and scale_word as `row_addresses` returns them.
    """
    START: tl.constexpr = piece_start(ROW, PIECE)
    channel = tl.arange(0, piece_width(ROW, PIECE))[None, :]
    mask = is_valid[:, None]
    if ROW.layout == "fp32":
        at = (row * (_UNIT // 4))[:, None] + (START + channel)
        x = tl.load(kv_ptr.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    elif ROW.layout == "bf16" or ROW.d_nope <= START:
        FIRST: tl.constexpr = (ROW.rope_start_bytes - 2 * ROW.d_nope) // 2 + START
        at = (row * (_UNIT // 2))[:, None] + (FIRST + channel)
        x = tl.load(kv_ptr.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0)
    else:
        x = _load_tile(kv_ptr, row, scale_word, is_valid, ROW, START, NATIVE_FP8, DTYPE)
        if piece_width(ROW, PIECE) > ROW.tile:  # two tiles of 64
            second = _load_tile(
                kv_ptr, row, scale_word, is_valid, ROW, START + ROW.tile, NATIVE_FP8, DTYPE
            )
            joined = tl.permute(tl.join(x, second), (0, 2, 1))
            x = tl.reshape(joined, (x.shape[0], piece_width(ROW, PIECE)))
    return x.to(DTYPE)

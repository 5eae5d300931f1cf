"""Triton device functions on rows of channels that are cut into pieces.

A tile of 64 rows by 512 channels is too wide for the registers of most GPUs, so kernels hold a
tuple of pieces: PIECE channels each, the last one as narrow as powers of two allow.
"""
# Device functions take Triton values of several types, and loops over tl.static_range exist only
# when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def num_pieces(d, piece):
    """How many pieces cover the first d channels."""
    return triton.cdiv(d, piece)


@triton.constexpr_function
def piece_width(d, piece, c):
    """Channels of piece c of rows of d channels; the last piece may reach past d."""
    return min(piece, triton.next_power_of_2(d - c * piece))


def row_alignment(*strides: int) -> int:
    """ALIGN of the kernels, which take the strides of rows in multiples of it.

    Known to the compiler, it lets them load 16 bytes at a time.
    """
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


@triton.jit
def piece_channels(D: tl.constexpr, PIECE: tl.constexpr, C: tl.constexpr):
    """The channels of piece C."""
    return C * PIECE + tl.arange(0, piece_width(D, PIECE, C))


@triton.jit
def piece_mask(is_row, LIMIT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, C: tl.constexpr):
    """[rows, channels of piece C]: rows of `is_row` and channels below LIMIT."""
    mask = is_row[:, None]
    if C * PIECE + piece_width(D, PIECE, C) > LIMIT:
        mask = mask & (piece_channels(D, PIECE, C) < LIMIT)[None, :]
    return mask


@triton.jit
def load_pieces(rows, is_row, LIMIT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """The pieces of the rows at the pointers `rows` [n, 1] up to channel LIMIT.

    Rows outside `is_row` and channels from LIMIT on are not read and give 0.
    """
    pieces = ()
    for c in tl.static_range(num_pieces(LIMIT, PIECE)):
        pointers = rows + piece_channels(D, PIECE, c)[None, :]
        mask = piece_mask(is_row, LIMIT, D, PIECE, c)
        pieces += (tl.load(pointers, mask=mask, other=0.0),)
    return pieces


@triton.jit
def store_pieces(rows, is_row, pieces, LIMIT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Write pieces to the pointers `rows` [n, 1], cast to their element type."""
    for c in tl.static_range(num_pieces(LIMIT, PIECE)):
        pointers = rows + piece_channels(D, PIECE, c)[None, :]
        mask = piece_mask(is_row, LIMIT, D, PIECE, c)
        tl.store(pointers, pieces[c].to(rows.dtype.element_ty), mask=mask)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """fp32 accumulators [ROWS, piece] of the pieces up to channel LIMIT."""
    pieces = ()
    for c in tl.static_range(num_pieces(LIMIT, PIECE)):
        pieces += (tl.zeros([ROWS, piece_width(D, PIECE, c)], tl.float32),)
    return pieces


@triton.jit
def load_indices(entries, start, length, BLOCK_N: tl.constexpr):
    """Entries start .. start + BLOCK_N of a list, -1 from `length` on."""
    position = start + tl.arange(0, BLOCK_N)
    return tl.load(entries + position, mask=position < length, other=-1)


@triton.jit
def list_length(topk_length_ptr, i, topk):
    """How many entries of row i's list may count."""
    if topk_length_ptr is not None:
        topk = tl.minimum(tl.load(topk_length_ptr + i), topk)
    return topk

"""Channels cut into pieces for Triton, whose blocks are powers of two."""

from __future__ import annotations


def channel_pieces(
    start: int, end: int, widest: int, narrowest: int = 16
) -> tuple[tuple[int, int, int], ...]:
    """(first channel, width, end) of pieces that cover start..end in order, powers of two.

    Only the last piece may be wider than what is left: 192 channels are 128 + 64, 40 are 32 + 16.
    narrowest: 16 or more, the shortest inner axis of a matrix product.
    """
    pieces = []
    while start < end:
        width = min(widest, max(narrowest, 1 << ((end - start).bit_length() - 1)))
        pieces.append((start, width, min(start + width, end)))
        start += width
    return tuple(pieces)

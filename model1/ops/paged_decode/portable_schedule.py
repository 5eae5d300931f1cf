"""Which keys a program of paged decode works on, Triton.

Keys are counted in tiles of BLOCK_N; a request without keys counts as one tile, so that its rows
are written. The work is cut into parts, one per program (and tile of rows):

WHOLE     part i is request i.
BALANCED  all requests' tiles in a row, cut into equal ranges: however uneven the lengths, every
          program has as much to do. A range may end one request, hold others whole, begin a third.
FIXED     part i is chunk i % max_chunks of request i // max_chunks, part_tiles tiles long. What a
          row adds up does not depend on its batch mates.

A part that is not all of its request leaves, per row, its normalised output and the base-2
logarithm of its softmax denominator in a slot; `portable_combine` merges them.
"""

# pyright: reportMissingParameterType=none
# Only constexpr parameters of a kernel carry types.

from __future__ import annotations

import triton
import triton.language as tl

WHOLE = tl.constexpr(0)
BALANCED = tl.constexpr(1)
FIXED = tl.constexpr(2)


@triton.jit
def seqlen_of(cache_seqlens_ptr, request, max_seqlen):
    """Tokens of a request that its row of the table holds."""
    return tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + request), 0), max_seqlen)


@triton.jit
def tiles_of(seqlen, BLOCK_N: tl.constexpr):
    """Tiles of a request, at least one."""
    return tl.maximum(tl.cdiv(seqlen, BLOCK_N), 1)


@triton.jit
def all_tiles(cache_seqlens_ptr, b, max_seqlen, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tiles of every request, [BLOCK_B], 0 past the last."""
    request = tl.arange(0, BLOCK_B)
    seqlen = tl.load(cache_seqlens_ptr + request, mask=request < b, other=0)
    seqlen = tl.minimum(tl.maximum(seqlen, 0), max_seqlen)
    return tl.where(request < b, tiles_of(seqlen, BLOCK_N), 0)


@triton.jit
def balanced_range(tiles, part, num_parts, min_part_tiles):
    """First and last (exclusive) tile of a part in the row of all tiles, and tiles of a part."""
    total = tl.sum(tiles, 0)
    part_tiles = tl.maximum(tl.cdiv(total, num_parts), min_part_tiles)
    first = tl.minimum(part * part_tiles, total)
    return first, tl.minimum(first + part_tiles, total), part_tiles


@triton.jit
def request_at(tiles, tile):
    """The request that a tile of the row of all tiles belongs to."""
    return tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)


@triton.jit
def tiles_before(tiles, request):
    """Where a request begins in the row of all tiles."""
    return tl.sum(tl.where(tl.arange(0, tiles.shape[0]) < request, tiles, 0), 0)


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

# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""Rows of queries and tiles of paged keys, as the kernels of the low-rank scan see them: Triton.

A tile has QUERIES rows of one request times BLOCK_H heads: row m of it is head m % BLOCK_H of query
m // BLOCK_H, so that few heads fill the matrix unit with many queries. Channels are cut into
pieces (first channel, width, end), the projected ones before the rotary ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.online_softmax import LOWEST_LOGIT, log2_sum_of


@triton.jit
def program_rows(
    pid, head_first, cu_seqlens_q_ptr, row_first, row_end, row_tiles, num_splits,
    H: tl.constexpr, QUERIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The request and the split of a program; the first query of its tile, and where the request's
    queries end; row and head of each row of the tile, and whether there is one.

    Queries are within row_first..row_end. Tiles are counted from the request's first query of that
    range, which may have none.
    """
    tile, split = pid % row_tiles, pid // row_tiles % num_splits
    request = pid // row_tiles // num_splits
    first = tl.maximum(tl.load(cu_seqlens_q_ptr + request), row_first) + tile * QUERIES
    last = tl.minimum(tl.load(cu_seqlens_q_ptr + request + 1), row_end)
    at = tl.arange(0, QUERIES * BLOCK_H)
    row, head = first + at // BLOCK_H, head_first + at % BLOCK_H
    return request, split, first, last, row, head, (row < last) & (head < H)


@triton.jit
def visible_keys(key_end_ptr, row, is_row, max_seqlen):
    """How many keys each row sees."""
    end = tl.load(key_end_ptr + row, mask=is_row, other=0)
    return tl.minimum(tl.maximum(end, 0), max_seqlen)


@triton.jit
def split_keys(end, split, num_splits, min_split_tiles, BLOCK_N: tl.constexpr):
    """First key of a split and where it ends: an even share of the tiles before `end`."""
    share = tl.maximum(tl.cdiv(tl.cdiv(end, BLOCK_N), num_splits), min_split_tiles) * BLOCK_N
    return split * share, tl.minimum(split * share + share, end)


@triton.jit
def block_ids(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of the tile of keys at `start`: one for all if the tile lies in one block."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)


@triton.jit
def load_queries(q_ptr, offsets, is_row, PIECES):
    """Every piece of the tile's queries; zeros where there is no row."""
    q = ()
    for i in tl.static_range(len(PIECES)):
        channel = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_row[:, None] & (channel < PIECES[i][2])[None, :]
        q += (tl.load(q_ptr + offsets[:, None] + channel[None, :], mask=mask, other=0.0),)
    return q


@triton.jit
def load_keys(
    z_ptr, rope_ptr, blocks, offset, is_key, stride_z, stride_rope, PIECES,
    R: tl.constexpr, STRIDE_ROPE_ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Every piece of the tile's keys, [BLOCK_N, width] in COMPUTE; zeros where there is no key.

    offset: of each key in its block. The rotary channels lie in the rows of the token cache.
    """
    blocks, offset = blocks.to(tl.int64), offset.to(tl.int64)
    z_row = (blocks * BLOCK_SIZE + offset) * stride_z
    rope_row = blocks * stride_rope + offset * STRIDE_ROPE_ROW
    keys = ()
    for i in tl.static_range(len(PIECES)):
        channel = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = is_key[:, None]
        if PIECES[i][0] + PIECES[i][1] > PIECES[i][2]:
            mask = mask & (channel < PIECES[i][2])[None, :]
        if PIECES[i][0] < R:
            at = z_ptr + z_row[:, None] + channel[None, :]
        else:
            at = rope_ptr + rope_row[:, None] + (channel - R)[None, :]
        keys += (tl.load(at, mask=mask, other=0.0).to(COMPUTE),)
    return keys


@triton.jit
def merged_lse(lse_ptr, at, is_row, num_splits, SPLITS: tl.constexpr):
    """Base-2 log-sum-exp of each row over its splits, which begin at `at`; -inf without keys.

    SPLITS: how many are merged at once.
    """
    largest = tl.full(at.shape, LOWEST_LOGIT, tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = is_row[:, None] & (split < num_splits)[None, :]
        part = tl.load(lse_ptr + at[:, None] + split[None, :], mask=mask, other=float("-inf"))
        previous = largest
        largest = tl.maximum(previous, tl.max(part, 1))
        total = total * tl.exp2(previous - largest) + tl.sum(tl.exp2(part - largest[:, None]), 1)
    log2_sum, _ = log2_sum_of(largest, total)
    return log2_sum

"""Sums over (query, key) pairs by key, in the order of the queries: the reproducible dkv.

The backward writes the gradient of every pair into a buffer. Sorting the pairs by key, stably,
gives each key its list of pairs, and one program per key adds them in that order, which no
scheduling changes. The cost beside the atomic version: a buffer of up to PAIRS_BYTES, 4 d bytes
written and read per pair and tile of heads, and one sort per bufferful of queries.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS_BYTES = 1 << 29  # size of the buffer, unless one query needs more
PAIR_BLOCK, PAIR_PIECE = 16, 128  # pairs and channels that a program adds at once


def rows_per_buffer(pairs_per_row: int, d: int) -> int:
    """Queries whose pairs fit into the buffer."""
    return max(1, PAIRS_BYTES // max(1, 4 * d * pairs_per_row))


@triton.jit(do_not_specialize=["topk", "num_tiles"])
def sum_pairs_kernel(
    pairs_ptr, order_ptr, ends_ptr, dkv_ptr, topk, num_tiles,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Add one key's pairs, which `order` lists from ends[key] to ends[key + 1], to dkv[key]."""
    key = (tl.program_id(0) // tl.cdiv(D, PIECE)).to(tl.int64)
    channels = (tl.program_id(0) % tl.cdiv(D, PIECE)) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(ends_ptr + key), tl.load(ends_ptr + key + 1)
    acc = tl.zeros([PIECE], tl.float32)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        entry = tl.load(order_ptr + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (channels < D)[None, :]
        for tile in range(0, num_tiles):
            pair = (entry // topk * num_tiles + tile) * topk + entry % topk
            pointers = pairs_ptr + pair[:, None] * D + channels[None, :]
            acc += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
    pointers = dkv_ptr + key * D + channels
    inside = (channels < D) & (begin < end)
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + acc, mask=inside)


def add_pairs(
    dkv: Tensor, pairs: Tensor, topk_indices: Tensor, topk_length: Tensor | None, num_tiles: int
) -> None:
    """Add pairs [rows * num_tiles * topk, d] of the rows of topk_indices to dkv [s, d], fp32."""
    (num_keys, d), topk = dkv.shape, topk_indices.shape[1]
    if num_keys == 0 or topk == 0:
        return
    is_key = (topk_indices >= 0) & (topk_indices < num_keys)
    if topk_length is not None:
        is_key &= torch.arange(topk, device=dkv.device) < topk_length[:, None]
    keys, order = torch.where(is_key, topk_indices, num_keys).flatten().sort(stable=True)
    every_key = torch.arange(num_keys + 1, dtype=keys.dtype, device=dkv.device)
    ends = torch.searchsorted(keys, every_key)
    sum_pairs_kernel[(num_keys * -(-d // PAIR_PIECE),)](
        pairs, order, ends, dkv, topk, num_tiles, **pair_constants(d)
    )


def pair_constants(d: int) -> dict[str, Any]:
    """The compile-time arguments of `sum_pairs_kernel`."""
    return {"D": d, "BLOCK": PAIR_BLOCK, "PIECE": PAIR_PIECE}

"""How the low-rank scan is cut for a GPU: tiles, splits of the keys, chunks of rows. No Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model1.errors import BackendUnavailable
from model1.ops.channel_pieces import channel_pieces
from model1.ops.compile_cases import KernelTarget
from model1.ops.kv_cache import KVLayout

MAX_HEADS = 128  # of one program, which sums the votes of all heads
WORKSPACE_BYTES = 256 << 20  # of scratch memory a call may take; one row may need more
_WIDEST_PIECE = 128
# What a split costs besides its keys (start, finish, merge), as a number of keys. A guess.
_SPLIT_COST_KEYS = 128
_MAX_SPLITS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The sizes of the kernels that walk the keys."""

    block_m: int  # rows (query, head) of a tile, at least; all heads of a query are in one
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2  # that run at the same time
    num_splits: int | None = None  # None: from the shapes
    deterministic_split_keys: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanShape:
    """The shapes of a call that kernels are compiled for."""

    h: int
    r: int
    layout: KVLayout
    block_size: int
    dtype: torch.dtype

    @property
    def block_h(self) -> int:
        """Rows of a tile that one query takes."""
        return 1 << (self.h - 1).bit_length()

    @property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Channel pieces of a key, the projected ones before the rotary ones."""
        width = self.r + self.layout.d_rope
        return channel_pieces(0, self.r, _WIDEST_PIECE) + channel_pieces(
            self.r, width, _WIDEST_PIECE
        )

    @property
    def stores_weights(self) -> bool:
        """Whether 16 bits per head, written and read, are less than a second reading of a key."""
        return 2 * self.h < self.r + self.layout.d_rope

    def queries(self, config: Config) -> int:
        """Queries of a tile."""
        return max(1, config.block_m // self.block_h)


@dataclass(frozen=True, slots=True)
class Cut:
    """How many programs a chunk of rows has, and the least that one of them does."""

    rows: int  # of a chunk
    row_tiles: int  # of one request in a chunk, at most
    num_splits: int
    min_split_tiles: int  # tiles of keys


def choose_config(target: KernelTarget, shape: ScanShape, *, is_single: bool) -> Config:
    """The sizes for a GPU. One query for each request: measured on an H200, 2026-11-23.

    is_single: each request has one query, or bits must not depend on how many it has.
    """
    if shape.h > MAX_HEADS:
        raise BackendUnavailable(f"the triton scan takes {MAX_HEADS} heads, got {shape.h}")
    if shape.dtype == torch.float32:  # right, not fast: no model runs so
        return Config(block_m=16, block_n=32, num_warps=4, num_stages=1)
    is_wide = shape.r + shape.layout.d_rope > 2 * _WIDEST_PIECE
    is_cuda = target.kind == "cuda"
    is_large = is_cuda and target.arch in (90, 100)
    least = 16 if is_single else 64 if is_large else 32
    block_m = max(least, shape.block_h)
    # without the matrix unit of sm_90 and sm_100 the mask of many queries costs registers
    has_wide_mask = is_cuda and not (is_single or is_large) and shape.block_h < least
    num_warps = 8 if block_m > 64 or has_wide_mask else 4
    if is_wide:
        return Config(block_m=block_m, block_n=32, num_warps=8, num_stages=1)
    if not is_cuda:
        return Config(block_m=block_m, block_n=64, num_warps=num_warps, num_stages=1)
    return Config(block_m=block_m, block_n=64, num_warps=num_warps, num_stages=3)


def choose_cut(
    config: Config, shape: ScanShape, *, t: int, b: int, max_seqlen_q: int, max_seqlen: int,
    row_bytes: int, split_bytes: int, num_sms: int, deterministic: bool,
) -> Cut:  # fmt: skip
    """Chunks whose scratch memory, row_bytes and split_bytes per split for a row, is bounded."""
    queries = shape.queries(config)
    rows = max(1, min(t, WORKSPACE_BYTES // row_bytes))
    tiles = min(b * -(-max_seqlen_q // queries), rows)
    if deterministic:
        # the keys of a split do not depend on anything, and so neither do a row's partial sums
        num_splits = max(1, -(-max_seqlen // config.deterministic_split_keys))
        min_split_tiles = config.deterministic_split_keys // config.block_n
    else:
        parallel = config.programs_per_sm * num_sms
        num_splits = config.num_splits or choose_num_splits(tiles, max_seqlen, parallel)
        min_split_tiles = 1
    rows = max(1, min(rows, WORKSPACE_BYTES // (row_bytes + num_splits * split_bytes)))
    rows = -(-t // -(-t // rows))  # chunks of about one size
    row_tiles = -(-min(rows, max_seqlen_q) // queries)
    return Cut(rows, row_tiles, num_splits, min_split_tiles)


@functools.lru_cache(maxsize=4096)
def choose_num_splits(num_tiles: int, max_seqlen: int, parallel: int) -> int:
    """The fewest splits that are as fast as any, if `parallel` programs run at a time."""

    def cost(splits: int) -> int:
        rounds = -(-num_tiles * splits // parallel)
        return rounds * (-(-max_seqlen // splits) + _SPLIT_COST_KEYS)

    return min(range(1, _MAX_SPLITS + 1), key=cost)


def row_chunks(t: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and end of every chunk."""
    return ((first, min(first + rows, t)) for first in range(0, t, rows))

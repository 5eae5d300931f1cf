"""How paged decode is cut for a GPU: tiles, pieces of channels and splits of the keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import KernelTarget
from model1.ops.kv_cache.layout import KVLayout

_MAX_CHANNELS = 576  # more would not fit the shared memory of the smaller GPUs
_MAX_SPLITS = 512
# What a split costs besides its keys (start, finish, combine), as a number of keys. A guess.
_SPLIT_COST_KEYS = 256
_SPLIT_SLACK = 1.05  # splits take scratch memory: a small gain is not worth more of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call, apart from its tensors."""

    layout: KVLayout | None  # of an 8-bit cache; None: plain numbers
    dtype: torch.dtype
    d: int
    value_dim: int
    group: int  # query heads of a key head
    hkv: int
    block_size: int
    b: int
    s_q: int  # queries of a request, or the most that one has
    max_seqlen: int  # tokens that a request's row of the table holds
    softmax_scale: float
    causal: bool
    empty_lse: float
    deterministic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The sizes of the kernels."""

    block_m: int  # rows (query, head) of a tile
    block_n: int  # keys of a step
    channels: int = 128  # of the widest piece; those of one to four FP8 scales
    num_warps: int
    num_stages: int
    tiles_per_sm: int = 1  # that run at the same time
    num_splits: int | None = None  # None: from the shapes
    deterministic_split_keys: int = 2048


@dataclass(frozen=True, slots=True)
class Cut:
    """How many programs there are, and the least that one of them does."""

    row_tiles: int  # of one request and key head
    num_splits: int
    min_split_tiles: int  # tiles of keys


def choose_config(target: KernelTarget, problem: Problem) -> Config:
    """The sizes for a GPU; BackendUnavailable for too many channels. Not yet measured."""
    if problem.d > _MAX_CHANNELS:
        got = problem.d
        raise BackendUnavailable(f"paged_decode/triton takes {_MAX_CHANNELS} channels, got {got}")
    # a choice that followed the batch's longest query would change the bits of its mates
    rows = problem.group * (1 if problem.deterministic else problem.s_q)
    is_fp8 = problem.layout is not None
    if problem.dtype == torch.float32:
        return Config(block_m=16, block_n=16, num_warps=4, num_stages=1)
    if target.kind == "hip":
        return Config(block_m=16, block_n=32, num_warps=4, num_stages=2 if is_fp8 else 1)
    has_large_shared_memory = target.arch in (80, 90, 100)  # the others have 99 KB per block
    if rows > 32 and target.arch == 90:
        # 64 rows fill the matrix unit; two steps of 64 keys of 576 channels fill shared memory
        if is_fp8:
            return Config(block_m=64, block_n=32, num_warps=8, num_stages=3)
        return Config(block_m=64, block_n=64, num_warps=8, num_stages=2)
    if rows > 16:
        if is_fp8:
            return Config(block_m=32, block_n=16, num_warps=8, num_stages=2)
        block_n = 32 if has_large_shared_memory else 16
        return Config(block_m=32, block_n=block_n, num_warps=8, num_stages=3)
    if is_fp8:
        return Config(block_m=16, block_n=32, num_warps=8, num_stages=2)
    if target.arch in (90, 100):
        return Config(block_m=16, block_n=32, num_warps=4, num_stages=3, tiles_per_sm=2)
    return Config(block_m=16, block_n=32, num_warps=8, num_stages=3)


def choose_cut(config: Config, problem: Problem, num_sms: int) -> Cut:
    """The programs of a call."""
    row_tiles = _ceil_div(problem.group * problem.s_q, config.block_m)
    if problem.deterministic:
        # the keys of a split do not depend on anything, and so neither do a row's partial sums
        keys = config.deterministic_split_keys
        return Cut(row_tiles, max(1, _ceil_div(problem.max_seqlen, keys)), keys // config.block_n)
    num_splits = config.num_splits or _choose_num_splits(
        problem.b * problem.hkv * row_tiles, problem.max_seqlen, config.tiles_per_sm * num_sms
    )
    return Cut(row_tiles, num_splits, 1)


@functools.lru_cache(maxsize=4096)
def _choose_num_splits(num_tiles: int, max_seqlen: int, num_slots: int) -> int:
    """The fewest splits that are nearly the fastest, if num_slots programs run at a time.

    The time is rounds of programs times the keys of each, with every request as long as can be.
    """
    splits = range(1, _MAX_SPLITS + 1)
    times = [
        _ceil_div(num_tiles * n, num_slots) * (_ceil_div(max_seqlen, n) + _SPLIT_COST_KEYS)
        for n in splits
    ]
    limit = min(times) * _SPLIT_SLACK
    return next(n for n, time in zip(splits, times, strict=True) if time <= limit)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

"""How paged decode is cut for a GPU: tiles, pieces of channels and parts of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import KernelTarget
from model1.ops.kv_cache.layout import KVLayout
from model1.ops.launch import USUAL_CHANNELS, max_channels

_MAX_BALANCED_REQUESTS = 4096  # every program adds up the lengths of all requests


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
    stored: torch.dtype  # of plain numbers in the cache; of an 8-bit cache dtype
    is_ragged: bool = False  # requests have different numbers of queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The sizes of the kernels."""

    block_m: int  # rows (query, head) of a tile
    block_n: int  # keys of a step
    channels: int = 128  # of the widest piece; those of one to four FP8 scales
    num_warps: int
    num_stages: int
    split_scores: bool = False  # two warp groups share a score product: 64 rows on Hopper
    # Nothing is kept in registers, from step to step or from request to request, that can be
    # computed again: none are left. Found by compiling for every target.
    is_tight: bool = False
    tiles_per_sm: int = 1  # that run at the same time
    num_parts: int | None = None  # None: from the shapes
    min_part_keys: int = 128  # a shorter part costs more to merge than it saves
    deterministic_part_keys: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the keys are cut into parts; the forms and their terms are in `portable_schedule`."""

    form: Literal["whole", "balanced", "fixed"]
    row_tiles: int  # of one request and key head
    num_parts: int
    part_tiles: int = 1  # tiles of keys: the least (balanced) or all (fixed) of a part
    max_chunks: int = 1
    num_slots: int = 0  # of partial results


def choose_config(target: KernelTarget, problem: Problem) -> Config:
    """The sizes for a GPU; BackendUnavailable for too many channels.

    Measured on an H200, 2026-11-22 and 2026-12-01 (docs/log.md); on other GPUs what fits.
    """
    if problem.d > (most := max_channels(target, problem.dtype)):
        got = problem.d
        raise BackendUnavailable(f"paged_decode/triton takes {most} channels here, got {got}")
    if problem.d > USUAL_CHANNELS and target.kind == "cuda":  # the tile that fits
        # right, not fast: no model has such rows
        return Config(block_m=16, block_n=16, num_warps=8, num_stages=1, is_tight=True)
    # a choice that followed the batch's longest query would change the bits of its mates
    rows = problem.group * (1 if problem.deterministic else problem.s_q)
    is_fp8 = problem.layout is not None
    if problem.dtype == torch.float32 or problem.stored != problem.dtype:  # right, not fast
        return Config(block_m=16, block_n=16, num_warps=4, num_stages=1)
    if target.kind == "hip":
        return Config(block_m=16, block_n=32, num_warps=4, num_stages=2 if is_fp8 else 1)
    if target.arch == 90 and (is_fp8 or rows > 16):
        return _hopper_config(problem, rows)
    if is_fp8:
        return Config(block_m=16, block_n=32, num_warps=8, num_stages=2)
    if rows > 16:
        has_large_shared_memory = target.arch in (80, 100)  # the others have 99 KB per block
        block_n = 32 if has_large_shared_memory else 16
        is_tight = target.arch == 120  # whose compiler aims at 128 registers, and spills
        return Config(block_m=32, block_n=block_n, num_warps=8, num_stages=3, is_tight=is_tight)
    if target.arch in (90, 100):
        channels = 64 if problem.is_ragged else 128  # ragged pieces of 128 channels would spill
        return Config(
            block_m=16, block_n=32, channels=channels, num_warps=4, num_stages=3, tiles_per_sm=2
        )
    return Config(block_m=16, block_n=32, num_warps=8, num_stages=3)


def _hopper_config(problem: Problem, rows: int) -> Config:
    is_fp8 = problem.layout is not None
    if is_fp8 or rows > 32:
        # 64 rows fill the matrix unit; two steps of 64 keys of 576 channels fill shared memory
        channels = 128 if is_fp8 else 512
        return Config(
            block_m=64, block_n=64, channels=channels, num_warps=8, num_stages=2,
            split_scores=True, is_tight=True,
        )  # fmt: skip
    # 64 keys take 16 % less time, but would spill unless all parts are equal
    has_equal_parts = problem.hkv == 1 and problem.max_seqlen > 0
    has_equal_parts &= problem.b <= _MAX_BALANCED_REQUESTS
    is_long = has_equal_parts and not problem.is_ragged and not problem.deterministic
    return Config(
        block_m=32, block_n=64 if is_long else 32, channels=64, num_warps=4,
        num_stages=2 if is_long else 3, is_tight=True, tiles_per_sm=2,
    )  # fmt: skip


def choose_schedule(config: Config, problem: Problem, num_sms: int) -> Schedule:
    """How a call is cut; follows from shapes alone, so that a captured graph fits other lengths."""
    row_tiles = _ceil_div(problem.group * problem.s_q, config.block_m)
    tiles, b = row_tiles * problem.hkv, problem.b
    if problem.deterministic:
        keys = config.deterministic_part_keys
        chunks = max(1, _ceil_div(problem.max_seqlen, keys))
        return Schedule(
            form="fixed", row_tiles=row_tiles, num_parts=b * chunks, max_chunks=chunks,
            part_tiles=keys // config.block_n, num_slots=b * chunks,
        )  # fmt: skip
    most = b * _ceil_div(problem.max_seqlen, config.min_part_keys)
    num_parts = config.num_parts or min(config.tiles_per_sm * num_sms // tiles, most)
    # requests of few queries leave most tiles of rows empty: equal parts of keys are not equal work
    is_uneven = problem.is_ragged and row_tiles > 1
    # with one part the requests of a tile of rows would run one after the other
    is_single = num_parts == 0 or (num_parts == 1 and b > 1)
    if is_single or is_uneven or b > _MAX_BALANCED_REQUESTS:
        return Schedule(form="whole", row_tiles=row_tiles, num_parts=b)
    return Schedule(
        form="balanced", row_tiles=row_tiles, num_parts=num_parts, num_slots=2 * num_parts,
        part_tiles=_ceil_div(config.min_part_keys, config.block_n),
    )  # fmt: skip


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

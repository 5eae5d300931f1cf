"""Sparse decode in Triton, for any GPU: sizes, launches and the list of kernels.

One launch, or two where rows are split, or three where, besides, bits must not depend on padding.
The host decides from shapes alone and never waits, so a CUDA graph of the launches may be replayed
with other slots and lengths.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import (
    USUAL_CHANNELS,
    device_target,
    fast_divisor,
    launch_options,
    max_channels,
    num_sms,
)
from model1.ops.sparse_decode.portable_kernel import (
    _flash_fwd_mla_combine_kernel,
    _flash_fwd_splitkv_mla_fp8_sparse_kernel,
    _sparse_list_lengths_kernel,
)
from model1.ops.sparse_decode.portable_row import UNIT_BYTES, RowFormat

_CHANNEL_STEP = 16  # the shortest inner axis of a matrix product
# A split's length that depends on no batch, long enough that most rows are not split.
_DETERMINISTIC_KEYS = 1024
# The costs, in tiles, of starting and finishing a program and of the second launch. Guesses.
_PROGRAM_COST = 1.0
_COMBINE_COST = 1.0
_PARTIALS_PER_TILE = 64  # partial results that all SMs together write and read in a tile's time
_COMBINE_WARPS = 4
_LIST_BLOCK = 1024  # entries of a list that are looked at in a step
_LIST_WARPS = 4
_INT32_MAX = (1 << 31) - 1  # slots are int32: a cache may have more than they can name


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is cut."""

    block_h: int  # heads of a program
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1  # that run at the same time
    split_scores: bool = False  # two warp groups share a score product: 64 heads on Hopper
    split_tiles: int | None = None  # tiles of a split; None: from the shapes


@dataclass(frozen=True, slots=True)
class Scope:
    """A cache, the slots that are attended in it and how many of them count."""

    kv_cache: Tensor | None
    slots: Tensor | None
    length: Tensor | None
    block_size: int

    @property
    def topk(self) -> int:
        """Entries of a list."""
        return 0 if self.slots is None else self.slots.shape[-1]

    @property
    def slot_strides(self) -> tuple[int, int]:
        """From request to request and from query to query."""
        return (0, 0) if self.slots is None else (self.slots.stride(0), self.slots.stride(1))

    @property
    def addressing(self) -> tuple[int, int, int, int, int]:
        """Units from block to block, tokens of a block, how to divide by them, the last slot."""
        units, last_slot = 0, -1
        if self.kv_cache is not None:
            units = self.kv_cache.stride(0) // UNIT_BYTES
            last_slot = min(len(self.kv_cache) * self.block_size - 1, _INT32_MAX)
        return units, self.block_size, *fast_divisor(self.block_size), last_slot


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def choose_config(target: KernelTarget, h: int, dtype: torch.dtype, layout: KVLayout) -> Config:
    """The sizes for a GPU and a number of heads.

    Measured for 64 and 128 heads on an H200, 2026-11-22 (docs/log.md); on other GPUs what fits.
    With three stages the rows of one tile are copied while the tile before is worked on; with
    split_scores, and for rows that need no conversion, two are enough.
    """
    stored = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(layout.name, dtype)
    if layout.d > USUAL_CHANNELS and target.kind == "cuda":  # the tile that fits
        return Config(block_h=16, block_n=16, num_warps=8, num_stages=1)
    if dtype == torch.float32 or stored != dtype:  # right, not fast: no model runs so
        return Config(block_h=16, block_n=16, num_warps=4, num_stages=1)
    if target.kind == "hip":
        return Config(block_h=16, block_n=16, num_warps=4, num_stages=1, programs_per_sm=2)
    if target.arch == 90 and h > 32:
        return Config(block_h=64, block_n=64, num_warps=8, num_stages=2, split_scores=True)
    if target.arch not in (80, 90, 100):  # 99 KB of shared memory
        if h > 16:
            return Config(block_h=32, block_n=16, num_warps=8, num_stages=3)
        return Config(block_h=16, block_n=16, num_warps=4, num_stages=3)
    # On sm_100 a tile of 64 heads would ask for more tensor memory than there is.
    if h > 16:
        return Config(block_h=32, block_n=32, num_warps=8, num_stages=3)
    if target.arch == 80:
        return Config(block_h=16, block_n=32, num_warps=4, num_stages=3)
    # Two programs an SM; V3.2's rows are too wide for that in three stages.
    stages = 2 if layout.name == "v32_fp8" else 3
    return Config(block_h=16, block_n=32, num_warps=4, num_stages=stages, programs_per_sm=2)


@functools.lru_cache(maxsize=4096)
def choose_split_tiles(num_programs: int, num_tiles: int, num_parallel: int) -> int:
    """Tiles of a split with which num_programs rows of num_tiles tiles are done first.

    num_parallel: programs that run at a time. The fewest splits of those that are as good.
    """

    def cost(split_tiles: int) -> float:
        splits = _ceil_div(num_tiles, split_tiles)
        rounds = _ceil_div(num_programs * splits, num_parallel)
        merge = _COMBINE_COST + num_programs * splits / _PARTIALS_PER_TILE if splits > 1 else 0.0
        return rounds * (split_tiles + _PROGRAM_COST) + merge

    return min(range(max(num_tiles, 1), 0, -1), key=cost)


def sparse_decode_triton(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_topk_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    layout: KVLayout,
    block_size: int,
    extra_block_size: int,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
    config: Config | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.sparse_decode.sparse_decode`. fp32 queries multiply in IEEE fp32, slowly.

    out_dtype: of a caller that goes on computing with out; None = q's.

    Where rows are split it takes scratch memory of 4 * (value_dim + 1) bytes per split, query and
    head. Raises BackendUnavailable for rows that are too wide, see `max_channels`, and for widths
    that are not multiples of 16.
    """
    target = device_target(q.device)
    _check_widths(layout, max_channels(target, q.dtype))
    b, s_q, h, _ = q.shape
    out = torch.empty(b, s_q, h, value_dim, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty(b, s_q, h, dtype=torch.float32, device=q.device)
    if b > 0:
        main = Scope(kv_cache, topk_indices, topk_length, block_size)
        extra = Scope(extra_kv_cache, extra_topk_indices, extra_topk_length, extra_block_size)
        config = config or choose_config(target, h, q.dtype, layout)
        scale_log2 = softmax_scale * math.log2(math.e)
        _launch(
            q, main, extra, attn_sink, out, lse, scale_log2, empty_lse,
            _constants(layout, value_dim, config, target), config, deterministic,
        )  # fmt: skip
    return out, lse


def _check_widths(layout: KVLayout, most: int) -> None:
    if layout.d_nope % _CHANNEL_STEP or layout.d_rope % _CHANNEL_STEP:
        raise BackendUnavailable(
            f"sparse_decode/triton needs d_nope and d_rope that are multiples of {_CHANNEL_STEP}, "
            f"got {layout.d_nope} and {layout.d_rope}"
        )
    if layout.d > most:
        raise BackendUnavailable(
            f"sparse_decode/triton takes at most {most} channels here, got {layout.d}"
        )


def _launch(
    q: Tensor, main: Scope, extra: Scope, attn_sink: Tensor | None, out: Tensor, lse: Tensor,
    scale_log2: float, empty_lse: float, constants: dict[str, Any], config: Config,
    deterministic: bool,
) -> None:  # fmt: skip
    b, s_q, h, value_dim = out.shape
    num_tiles = _ceil_div(main.topk, config.block_n) + _ceil_div(extra.topk, config.block_n)
    num_programs = b * s_q * _ceil_div(h, config.block_h)
    split_tiles = config.split_tiles
    if deterministic:
        split_tiles = _DETERMINISTIC_KEYS // config.block_n
    elif split_tiles is None:
        num_parallel = config.programs_per_sm * num_sms(q.device)
        split_tiles = choose_split_tiles(num_programs, num_tiles, num_parallel)
    num_splits = max(1, _ceil_div(num_tiles, split_tiles))
    partial, partial_lse = out, lse
    if num_splits > 1:
        sizes = (num_splits, b, s_q, h)
        partial = torch.empty(*sizes, value_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(sizes, dtype=torch.float32, device=q.device)
    rows_per_length = s_q
    if deterministic and num_splits > 1:
        main, extra = without_padding(main, extra, b, s_q)
        rows_per_length = 1
    counts = (rows_per_length, h, main.topk, extra.topk, split_tiles)
    with torch.cuda.device_of(q):
        _flash_fwd_splitkv_mla_fp8_sparse_kernel[(num_programs * num_splits,)](
            q, out, lse, partial, partial_lse, attn_sink,
            main.kv_cache, main.slots, main.length, extra.kv_cache, extra.slots, extra.length,
            b * s_q, s_q, *counts, scale_log2, empty_lse, q.stride(0), q.stride(1), q.stride(2),
            *main.slot_strides, *extra.slot_strides, *main.addressing, *extra.addressing,
            **constants, **launch_options(config.num_warps, config.num_stages),
        )  # fmt: skip
        if num_splits > 1:
            _flash_fwd_mla_combine_kernel[(b * s_q * h,)](
                out, lse, partial, partial_lse, attn_sink, main.length, extra.length,
                b * s_q, *counts, empty_lse, **_combine_constants(value_dim, config.block_n),
                **launch_options(_COMBINE_WARPS, 1),
            )  # fmt: skip


def without_padding(main: Scope, extra: Scope, b: int, s_q: int) -> tuple[Scope, Scope]:
    """The same lists, each row with a length of its own, at its last valid entry.

    Cut by these, a row's keys fall into the same tiles and splits however far the batch is padded.
    """
    assert main.slots is not None
    lengths = torch.empty(2, b * s_q, dtype=torch.int32, device=main.slots.device)
    constants: dict[str, Any] = {"BLOCK": _LIST_BLOCK}
    with torch.cuda.device_of(lengths):
        _sparse_list_lengths_kernel[(b * s_q,)](
            lengths, main.slots, main.length, extra.slots, extra.length,
            b * s_q, s_q, main.topk, extra.topk, *main.slot_strides, *extra.slot_strides,
            main.addressing[-1], extra.addressing[-1],
            **constants, **launch_options(_LIST_WARPS, 1),
        )  # fmt: skip
    extra_length = None if extra.slots is None else lengths[1]
    return replace(main, length=lengths[0]), replace(extra, length=extra_length)


def _constants(
    layout: KVLayout, value_dim: int, config: Config, target: KernelTarget
) -> dict[str, Any]:
    return {
        "ROW": RowFormat.of(layout, config.block_n),
        "VALUE_DIM": value_dim,
        "BLOCK_H": config.block_h,
        "BLOCK_N": config.block_n,
        "SPLIT_SCORES": config.split_scores,
        "NATIVE_FP8": target.has_fp8,
    }


def _combine_constants(value_dim: int, block_n: int) -> dict[str, Any]:
    block_c = triton.next_power_of_2(value_dim)
    return {"VALUE_DIM": value_dim, "BLOCK_C": block_c, "BLOCK_N": block_n}


_TYPES = {
    "q_ptr": "*bf16", "out_ptr": "*bf16", "lse_ptr": "*fp32", "partial_ptr": "*fp32",
    "partial_lse_ptr": "*fp32", "sink_ptr": "*fp32", "kv_ptr": "*u8", "slots_ptr": "*i32",
    "lengths_ptr": "*i32", "length_ptr": "*i32", "extra_kv_ptr": "*u8", "extra_slots_ptr": "*i32",
    "extra_length_ptr": "*i32", "scale_log2": "fp32", "empty_lse": "fp32",
    "divisor": "i64", "extra_divisor": "i64",
}  # fmt: skip
_OPTIONAL = ("sink_ptr", "length_ptr", "extra_kv_ptr", "extra_slots_ptr", "extra_length_ptr")
_LAYOUTS = (
    KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64),
    KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64),
)  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """MODEL1 with a second cache, lengths and a sink, V3.2 without; 16, 32 and 128 heads.

    Also of fp16 queries, and as the engine launches it: bare and to an fp32 result; and the widest
    rows that MODEL1 has and the target takes.
    """
    cases = []
    widest = KVLayout("model1_fp8", max_channels(target, torch.bfloat16) - 64, 64)
    cases.append(_case(f"{widest.name} {widest.d} h128", widest, 128, target, has_all=True))
    for layout in _LAYOUTS:
        name = layout.name if layout.is_fp8 else f"{layout.name} {layout.d}"
        has_all = layout.d_nope == 448
        for h in (16, 32, 128):
            cases.append(_case(f"{name} h{h}", layout, h, target, has_all=has_all))
        cases.append(_case(f"{name} h128 fp16", layout, 128, target, has_all=has_all, q="*fp16"))
        for h in (16, 128):
            cases.append(_case(f"{name} h{h} engine", layout, h, target, out="*fp32"))
        cases.append(_combine_case(f"{name} combine", layout, target, has_all=has_all))
        cases.append(_list_case(f"{name} list lengths", has_all=has_all))
    return cases


def _case(
    name: str, layout: KVLayout, h: int, target: KernelTarget, *, has_all: bool = False,
    q: str = "*bf16", out: str | None = None,
) -> CompileCase:  # fmt: skip
    config = choose_config(target, h, torch.bfloat16, layout)
    # contiguous queries: the launcher sees that their strides are multiples of 16
    strides = {"stride_q_b": h * layout.d, "stride_q_s": h * layout.d, "stride_q_h": layout.d}
    return _compile_case(
        name, _flash_fwd_splitkv_mla_fp8_sparse_kernel,
        strides | _constants(layout, max(512, layout.d_nope), config, target),
        launch_options(config.num_warps, config.num_stages),
        _TYPES | {"q_ptr": q, "out_ptr": out or q}, has_all=has_all,
    )  # fmt: skip


def _combine_case(
    name: str, layout: KVLayout, target: KernelTarget, *, has_all: bool
) -> CompileCase:
    constants = _combine_constants(512, choose_config(target, 128, torch.bfloat16, layout).block_n)
    options = launch_options(_COMBINE_WARPS, 1)
    kernel = _flash_fwd_mla_combine_kernel
    return _compile_case(name, kernel, constants, options, _TYPES, has_all=has_all)


def _list_case(name: str, *, has_all: bool) -> CompileCase:
    options = launch_options(_LIST_WARPS, 1)
    kernel = _sparse_list_lengths_kernel
    return _compile_case(name, kernel, {"BLOCK": _LIST_BLOCK}, options, _TYPES, has_all=has_all)


def _compile_case(
    name: str, kernel: Any, constants: dict[str, Any], options: dict[str, Any],
    types: dict[str, str], *, has_all: bool,
) -> CompileCase:  # fmt: skip
    if not has_all:
        constants = constants | {n: None for n in kernel.arg_names if n in _OPTIONAL}
    types = dict.fromkeys(kernel.arg_names, "i32") | types
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    return CompileCase(name, kernel, signature, constants, **options)

"""Triton products of rows that lie behind each other by group, each group with its own matrix.

    out[r] = B_g a[r]   for the rows r of group g;        dB_g = sum of the outer products over g

Group g has the rows ends[g - 1]..ends[g]; rows behind the last end are neither read nor written.
Programs are as many as tiles there may be, whatever the lengths: the host asks the device for
nothing. A row's bits depend on its own numbers and its group alone, not on its place. With scales,
codes are FP8 in groups of 128 along the sum: each group's product is scaled, then added in fp32.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportAssignmentType=none
# pyright: reportGeneralTypeIssues=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.bits import e4m3_to_fp32
from model1.ops.launch import device_target, launch_options
from model1.ops.rounding import round_to

# how codes are multiplied: by FP8 units, by those of AMD's older format, or widened (exact)
FP8_UNITS, FNUZ_UNITS, WIDE = 0, 1, 2


@dataclass(frozen=True)
class Config:
    """Tile sizes: rows, columns and the sum's axis. None is measured yet."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


HALF = Config(128, 128, 64, 8, 3)  # bf16 and fp16
HALF_64KB = Config(128, 128, 32, 8, 2)  # AMD's MI300 has 64 KB of shared memory
FEW_ROWS = Config(16, 128, 64, 4, 3)  # groups of under 32 rows on average
FULL = Config(32, 32, 32, 4, 2)  # fp32
FP8 = Config(128, 128, 128, 8, 3)  # a step along the sum is one group
FP8_SMALL = Config(64, 64, 128, 4, 2)  # GPUs with less shared memory, and few rows


@triton.jit
def _group_of_tile(tile, ends_ptr, m, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
                   BLOCK_M: tl.constexpr):  # fmt: skip
    """Group, first row and end of its rows of a tile; group = NUM_GROUPS if there is no such tile.

    GROUPS: NUM_GROUPS or more, a power of two; 0 for one group of all m rows.
    """
    if GROUPS == 0:
        group, first, end_of_group = tile * 0, tile * BLOCK_M, m
    else:
        index = tl.arange(0, GROUPS)
        is_group = index < NUM_GROUPS
        end = tl.load(ends_ptr + index, mask=is_group, other=0)
        start = tl.load(ends_ptr + index - 1, mask=is_group & (index > 0), other=0)
        tiles = tl.where(is_group, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
        group = tl.sum((is_group & (tl.cumsum(tiles, 0) <= tile)).to(tl.int32))
        before = tl.sum(tl.where(index < group, tiles, 0))
        first = tl.sum(tl.where(index == group, start, 0)) + (tile - before) * BLOCK_M
        end_of_group = tl.sum(tl.where(index == group, end, 0))
    return group, first, end_of_group


@triton.jit
def _factor(x, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Codes (uint8, or FP8 for FP8_UNITS) as what `tl.dot` takes."""
    if UNITS == 1:
        # the older format gives a code half its value, and minus zero's code is its NaN
        factor = tl.where(x == 0x80, 0, x).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    elif UNITS == 2:
        # the interpreter multiplies matrices in fp32 alone
        FACTOR: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16
        factor = e4m3_to_fp32(x).to(FACTOR)
    else:
        factor = x
    return factor


@triton.jit(do_not_specialize=["m"])
def _grouped_matmul_kernel(
    a_ptr, b_ptr, out_ptr, ends_ptr, a_scale_ptr, b_scale_ptr,
    m, n, k, stride_a, stride_b_group, stride_b_n, stride_b_k, stride_out,
    stride_a_scale, stride_b_scale_group, stride_b_scale,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # SCALES: 0 none, 1 of groups along the sum for a and b, 2 for b of blocks 128 x 128
    TILES_TOGETHER: tl.constexpr = (
        8  # row tiles that share columns of B while they are in the cache
    )
    tiles_n = (n + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.num_programs(0) // tiles_n
    band = tl.program_id(0) // (TILES_TOGETHER * tiles_n)
    in_band = tl.program_id(0) % (TILES_TOGETHER * tiles_n)
    height = tl.minimum(tiles_m - band * TILES_TOGETHER, TILES_TOGETHER)
    tile = band * TILES_TOGETHER + in_band % height
    group, first, end = _group_of_tile(tile, ends_ptr, m, NUM_GROUPS, GROUPS, BLOCK_M)
    if group == NUM_GROUPS:
        return
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    column = in_band // height * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = row < end, column < n
    step = tl.arange(0, BLOCK_K)
    a_ptr += row[:, None] * stride_a + step[None, :]
    b_ptr += group.to(tl.int64) * stride_b_group + column.to(tl.int64)[None, :] * stride_b_n
    b_ptr += step.to(tl.int64)[:, None] * stride_b_k
    if SCALES != 0:
        a_scale_ptr += row
        if SCALES == 2:
            b_scale_ptr += group * stride_b_scale_group + column // 128 * stride_b_scale
        else:
            b_scale_ptr += column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        is_a, is_b = is_row[:, None], is_column[None, :]
        if not EVEN_K:
            is_a &= (step < k - start)[None, :]
            is_b &= (step < k - start)[:, None]
        a = tl.load(a_ptr, mask=is_a, other=0.0)
        b = tl.load(b_ptr, mask=is_b, other=0.0)
        if SCALES == 0:
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, acc=total, input_precision="ieee")
        else:
            a, b = _factor(a, UNITS, INTERPRETED), _factor(b, UNITS, INTERPRETED)
            a_scale = tl.load(a_scale_ptr, mask=is_row, other=0.0)
            b_scale = tl.load(b_scale_ptr, mask=is_column, other=0.0)
            total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
            a_scale_ptr += stride_a_scale
            if SCALES == 2:
                b_scale_ptr += 1
            else:
                b_scale_ptr += stride_b_scale
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * stride_b_k
    if UNITS == 1:
        total *= 4.0
    out = out_ptr + row[:, None] * stride_out + column[None, :]
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out, round_to(total, out_dtype, INTERPRETED), mask=mask)


@triton.jit
def _grouped_outer_kernel(
    y_ptr, x_ptr, out_ptr, ends_ptr, n, k, stride_y, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # out[g, n, k] = sum over the rows r of g of y[r, n] x[r, k]; zeros for a group without rows
    tiles_k = (k + BLOCK_K - 1) // BLOCK_K
    tiles = (n + BLOCK_N - 1) // BLOCK_N * tiles_k
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    column_n = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    column_k = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    is_n, is_k = column_n < n, column_k < k
    end = tl.load(ends_ptr + group)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    step = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(start, end, BLOCK_M):
        row = (first + step).to(tl.int64)
        is_row = row < end
        y = y_ptr + row[None, :] * stride_y + column_n[:, None]
        y = tl.load(y, mask=is_n[:, None] & is_row[None, :], other=0.0)
        x = x_ptr + row[:, None] * stride_x + column_k[None, :]
        x = tl.load(x, mask=is_row[:, None] & is_k[None, :], other=0.0)
        if INTERPRETED:
            y, x = y.to(tl.float32), x.to(tl.float32)
        total = tl.dot(y, x, acc=total, input_precision="ieee")
    out = out_ptr + group.to(tl.int64) * n * k + column_n.to(tl.int64)[:, None] * k
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    mask = is_n[:, None] & is_k[None, :]
    tl.store(out + column_k[None, :], round_to(total, out_dtype, INTERPRETED), mask=mask)


@dataclass(frozen=True)
class Scales:
    """Of FP8 factors: a's [ceil(k/128), m]; b's [(groups,) ceil(n/128), k4] or [ceil(k/128), n]."""

    a: Tensor
    b: Tensor
    b_is_blocks: bool


def grouped_matmul(
    a: Tensor, b: Tensor, ends: Tensor | None, *, transpose_b: bool = False,
    out_dtype: torch.dtype | None = None, scales: Scales | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out [m, n] of rows a [m, k] and b [groups, n, k]; transpose_b: b is [groups, k, n].

    ends: [groups] int32, on the device; None: one group of all rows. scales: a and b are codes.
    """
    groups, n, k = b.shape if not transpose_b else (b.shape[0], b.shape[2], b.shape[1])
    m = a.shape[0]
    out = torch.empty(m, n, dtype=out_dtype or a.dtype, device=a.device)
    if m == 0:
        return out
    target = device_target(a.device)
    config = config or choose_config(m // groups, a.dtype, target)
    tiles_m = -(-m // config.block_m) + (groups if ends is not None else 0)
    units = _units(target)
    if scales is not None and units != FP8_UNITS:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    strides = (b.stride(2), b.stride(1)) if transpose_b else (b.stride(1), b.stride(2))
    a_scale, b_scale = (scales.a, scales.b) if scales else (a, a)
    kernel: Any = _grouped_matmul_kernel
    with torch.cuda.device_of(a):
        kernel[(tiles_m * -(-n // config.block_n),)](
            a, b, out, ends if ends is not None else a, a_scale, b_scale,
            m, n, k, a.stride(0), b.stride(0), *strides, n,
            a_scale.stride(0), b_scale.stride(0), b_scale.stride(-2),
            SCALES=0 if scales is None else 1 + scales.b_is_blocks, UNITS=units,
            INTERPRETED=knobs.runtime.interpret,
            **_constants(groups, ends is not None, k, config),
            **launch_options(config.num_warps, config.num_stages),
        )  # fmt: skip
    return out


def grouped_outer(y: Tensor, x: Tensor, ends: Tensor, config: Config | None = None) -> Tensor:
    """dB [groups, n, k] of rows y [m, n] and x [m, k]; zeros for groups without rows."""
    n, k, groups = y.shape[1], x.shape[1], ends.shape[0]
    out = torch.empty(groups, n, k, dtype=x.dtype, device=x.device)
    config = config or choose_config(128, x.dtype, device_target(x.device))
    tiles = -(-n // config.block_m) * -(-k // config.block_n)
    kernel: Any = _grouped_outer_kernel
    with torch.cuda.device_of(x):
        kernel[(groups * tiles,)](
            y, x, out, ends, n, k, y.stride(0), x.stride(0), BLOCK_M=config.block_k,
            BLOCK_N=config.block_m, BLOCK_K=config.block_n, INTERPRETED=knobs.runtime.interpret,
            **launch_options(config.num_warps, config.num_stages),
        )  # fmt: skip
    return out


def choose_config(rows: int, dtype: torch.dtype, target: KernelTarget) -> Config:
    """Tiles for about so many rows a group."""
    has_little = target.arch not in (80, 90, 100, "gfx950")
    if dtype.itemsize == 1:
        return FP8_SMALL if has_little or rows < 32 or _units(target) == WIDE else FP8
    if dtype == torch.float32:
        return FULL
    if rows < 32:
        return FEW_ROWS if target.kind == "cuda" else HALF_64KB
    return HALF_64KB if has_little else HALF


def _units(target: KernelTarget) -> int:
    if knobs.runtime.interpret:
        return WIDE
    if target.kind == "cuda":
        return FP8_UNITS if target.has_fp8 else WIDE
    return FNUZ_UNITS if str(target.arch).startswith("gfx94") else FP8_UNITS


def _constants(groups: int, has_ends: bool, k: int, config: Config) -> dict[str, Any]:
    return {
        "NUM_GROUPS": groups, "GROUPS": triton.next_power_of_2(groups) if has_ends else 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "EVEN_K": k % config.block_k == 0,
    }  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """64 experts of 2048 x 1408, and an FP8 product of 4096 x 4096."""
    half, code = torch.bfloat16, torch.float8_e4m3fn
    cases = [
        _matmul_case("experts", target, half, "*bf16", 64, 0, (2048, 1), 2048, 512),
        _matmul_case("experts back", target, half, "*bf16", 64, 0, (1, 2048), 1408, 512),
        _matmul_case("few rows", target, half, "*bf16", 64, 0, (2048, 1), 2048, 8),
        _matmul_case("experts fp32", target, torch.float32, "*fp32", 64, 0, (2048, 1), 2048, 512),
    ]
    codes = "*u8" if _units(target) != FP8_UNITS else "*fp8e4nv"
    for name, groups, scales in (("fp8", 0, 2), ("fp8 dw", 0, 1), ("fp8 experts", 64, 2)):
        case = _matmul_case(name, target, code, codes, groups, scales, (4096, 1), 4096, 4096)
        cases.append(case)
    config = choose_config(512, half, target)
    constants = {
        "stride_y": 2816, "stride_x": 2048, "n": 2816, "k": 2048, "BLOCK_M": config.block_k,
        "BLOCK_N": config.block_m, "BLOCK_K": config.block_n, "INTERPRETED": False,
    }  # fmt: skip
    types = dict.fromkeys(_grouped_outer_kernel.arg_names, "*bf16") | {"ends_ptr": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    outer = CompileCase("experts dw", _grouped_outer_kernel, types, constants,
                        config.num_warps, config.num_stages)  # fmt: skip
    return [*cases, outer]


def _matmul_case(
    name: str, target: KernelTarget, dtype: torch.dtype, pointer: str, groups: int, scales: int,
    strides: tuple[int, int], k: int, rows: int,
) -> CompileCase:  # fmt: skip
    config = choose_config(rows, dtype, target)
    constants = _constants(max(1, groups), groups > 0, k, config) | {
        "SCALES": scales, "UNITS": _units(target), "INTERPRETED": False, "k": k, "stride_a": k,
        "stride_b_n": strides[0], "stride_b_k": strides[1], "stride_out": 4096, "n": 4096,
        "stride_b_group": 4096 * k,
    }  # fmt: skip
    types = dict.fromkeys(_grouped_matmul_kernel.arg_names, "i32") | {
        "a_ptr": pointer, "b_ptr": pointer, "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32",
        "out_ptr": "*fp32" if pointer == "*fp32" else "*bf16", "ends_ptr": "*i32",
    }  # fmt: skip
    types |= dict.fromkeys(constants, "constexpr")
    return CompileCase(name, _grouped_matmul_kernel, types, constants, config.num_warps,
                       config.num_stages)  # fmt: skip

"""Triton kernel that quantises a matrix to block-scaled FP8, and its transpose in the same pass.

A program reads one tile, whose columns are one group of 128, and writes its codes and, for weights
and gradients, those of the transpose. Each number is read once; nothing depends on other tiles.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportAssignmentType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_write.encode import fp32_to_e4m3
from model1.ops.launch import device_target, launch_options

GROUP = 128
# Tokens of a tile that is quantised along rows alone, and its warps; others were not measured.
ROWS_BLOCK_T, ROWS_WARPS = 32, 4
WHOLE_WARPS = 8  # of a tile that is quantised along columns as well, or as one block
_KINDS = {"rows": 0, "both": 1, "blocks": 2}


@triton.jit
def scale_and_inverse(amax, POWER_OF_TWO: tl.constexpr):
    """The scale of groups and one over it, from the bits of their largest magnitudes.

    As 448 = 1.75 * 2^8, the exponent of the scale is that of amax less 8, and one more where the
    mantissa of amax exceeds 1.75. NaN and infinities have the largest bits of all: scale NaN.
    """
    if POWER_OF_TWO:
        exponent = tl.maximum(((amax + (0x7FFFFF - 0x600000)) >> 23) - 8, 1)
        exponent = tl.where(amax == 0, 127, exponent)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        # 1 / 448 in fp32, and no less than 2^-126
        scale = amax.to(tl.float32, bitcast=True) * 0.0022321429569274187
        scale = tl.where(amax == 0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
        inverse = 1.0 / scale
    return tl.where(amax >= 0x7F800000, float("nan"), scale), inverse


@triton.jit
def codes_of(x, inverse, amax, NATIVE: tl.constexpr):
    """The e4m3 codes of numbers; 0 where their group is not finite."""
    return fp32_to_e4m3(tl.where(amax >= 0x7F800000, 0.0, x * inverse), NATIVE)


@triton.jit(do_not_specialize=["t", "rows", "columns"])
def _quantize_kernel(
    x_ptr, stride_x_t, stride_x_c, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr,
    t, rows, columns, c, stride_scale, stride_scale_t,
    KIND: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    # rows, columns: of tokens that codes and codes_t have, t and what fills them up with zeros
    if ALIGNED:  # a multiple of 16, which the compiler shall see: else it stores codes_t by bytes
        columns = columns // 16 * 16
    GROUP: tl.constexpr = 128
    groups = (c + GROUP - 1) // GROUP
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    # of numbers in a tile 32 bits are enough, which saves registers; of tiles they are not
    row, column = tl.arange(0, BLOCK_T), tl.arange(0, GROUP)
    first, start = tile.to(tl.int64) * BLOCK_T, group.to(tl.int64) * GROUP
    is_channel = column < c - start
    x_ptr += first * stride_x_t + start * stride_x_c
    where = row[:, None] * stride_x_t + column[None, :] * stride_x_c
    x = tl.load(x_ptr + where, mask=(row < t - first)[:, None] & is_channel[None, :], other=0.0)
    x = x.to(tl.float32)
    # bits of magnitudes are in their order, NaN above all
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    is_row = row < rows - first
    store = codes_ptr + (first * c + start) + (row[:, None] * c + column[None, :])
    store_t = codes_t_ptr + (start * columns + first)
    store_t += column[:, None] * columns + row[None, :]
    is_stored = is_row[:, None] & is_channel[None, :]
    is_stored_t = is_channel[:, None] & (row < columns - first)[None, :]
    if KIND == 2:
        amax = tl.max(tl.max(size, axis=1), axis=0)
        scale, inverse = scale_and_inverse(amax, POWER_OF_TWO)
        tl.store(store, codes_of(x, inverse, amax, NATIVE), mask=is_stored)
        # The same number once more, by another way, so that no conversion to 8 bits feeds both
        # stores: ptxas 12.9 mixes up the bytes of those (Triton issue 11111).
        amax_t = tl.max(tl.max(size, axis=0), axis=0)
        _, inverse_t = scale_and_inverse(amax_t, POWER_OF_TWO)
        codes = codes_of(x, inverse_t, amax_t, NATIVE)
        tl.store(store_t, tl.trans(codes), mask=is_stored_t)
        tl.store(scale_ptr + tile * stride_scale + group, scale)
        tl.store(scale_t_ptr + group * stride_scale_t + tile, scale)
    else:
        amax = tl.max(size, axis=1)
        scale, inverse = scale_and_inverse(amax, POWER_OF_TWO)
        tl.store(store, codes_of(x, inverse[:, None], amax[:, None], NATIVE), mask=is_stored)
        tl.store(scale_ptr + group.to(tl.int64) * stride_scale + first + row, scale, mask=is_row)
        if KIND == 1:
            amax = tl.max(size, axis=0)
            scale, inverse = scale_and_inverse(amax, POWER_OF_TWO)
            codes = codes_of(x, inverse[None, :], amax[None, :], NATIVE)
            tl.store(store_t, tl.trans(codes), mask=is_stored_t)
            tl.store(scale_t_ptr + tile.to(tl.int64) * c + start + column, scale, mask=is_channel)


def fp8_quantize_triton(
    x: Tensor, *, kind: str, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `model1.ops.fp8_linear.ref.fp8_quantize_ref`: the same scales, and codes for "ue8m0".

    With fp32 scales a number in the middle of two codes, but for rounding, may get the other one: a
    GPU's plain division is not rounded to nearest.
    """
    t, c = x.shape
    rows = t if kind == "blocks" else -(-t // 16) * 16
    columns = t if kind == "blocks" else -(-t // GROUP) * GROUP
    results = _empty_results(x, kind, rows, columns)
    codes, scale, codes_t, scale_t = results
    covered = columns if kind == "both" else rows  # `columns` is never the smaller one
    if covered == 0:
        return results
    block_t = ROWS_BLOCK_T if kind == "rows" else GROUP
    kernel: Any = _quantize_kernel
    with torch.cuda.device_of(x):
        kernel[(-(-covered // block_t) * -(-c // GROUP),)](
            x, x.stride(0), x.stride(1), codes.view(torch.uint8), scale,
            codes_t.view(torch.uint8), scale_t, t, rows, columns, c,
            scale.stride(0), scale_t.stride(0),
            KIND=_KINDS[kind], POWER_OF_TWO=power_of_two, BLOCK_T=block_t,
            ALIGNED=columns % 16 == 0, NATIVE=_is_native(device_target(x.device)),
            **launch_options(_num_warps(kind), 1),
        )  # fmt: skip
    return results


def _empty_results(
    x: Tensor, kind: str, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, c = x.shape
    codes = torch.empty(rows, c, dtype=torch.float8_e4m3fn, device=x.device)
    if kind == "rows":
        codes_t, scales = codes.new_empty(0), ((-(-c // GROUP), rows), (0,))
    else:
        codes_t = codes.new_empty(c, columns)
        scales = (-(-c // GROUP), rows), (columns // GROUP, c)
    if kind == "blocks":  # a tail of these is not written
        first, second = (-(-t // GROUP), -(-c // 512) * 4), (-(-c // GROUP), -(-t // 512) * 4)
        scale, scale_t = (torch.ones(shape, device=x.device) for shape in (first, second))
    else:
        scale, scale_t = (torch.empty(shape, device=x.device) for shape in scales)
    return codes, scale, codes_t, scale_t


def _num_warps(kind: str) -> int:
    return ROWS_WARPS if kind == "rows" else WHOLE_WARPS


def _is_native(target: KernelTarget) -> bool:
    return target.has_fp8 and not knobs.runtime.interpret


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Activations [t, 4096] and weights [4096, 4096] in bf16."""
    cases = []
    for kind, power_of_two in (("rows", True), ("both", True), ("both", False), ("blocks", True)):
        block_t = ROWS_BLOCK_T if kind == "rows" else GROUP
        constants = {
            "KIND": _KINDS[kind], "POWER_OF_TWO": power_of_two, "BLOCK_T": block_t,
            "NATIVE": target.has_fp8, "ALIGNED": True,
            "stride_x_t": 4096, "stride_x_c": 1, "c": 4096,
        }  # fmt: skip
        types = dict.fromkeys(_quantize_kernel.arg_names, "i32") | {
            "x_ptr": "*bf16", "codes_ptr": "*u8", "codes_t_ptr": "*u8", "scale_ptr": "*fp32",
            "scale_t_ptr": "*fp32",
        }  # fmt: skip
        types |= dict.fromkeys(constants, "constexpr")
        warps = _num_warps(kind)
        name = f"quantize {kind} {'ue8m0' if power_of_two else 'fp32'}"
        cases.append(CompileCase(name, _quantize_kernel, types, constants, warps, 1))
    return cases

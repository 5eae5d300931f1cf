"""Triton kernel for root-mean-square normalisation behind the addition of a residual, forward.

A program has all channels of a few rows: one read of every input, one write of every result.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to

SHIPPED_CHANNELS = 4096


@dataclass(frozen=True)
class Config:
    """How the work is cut. Not yet measured."""

    elements: int = 2048  # of a program's tile, at least one row
    elements_per_warp: int = 1024
    max_warps: int = 16
    num_parts: int = 512  # backward: programs that add up the weight's gradient, at most
    min_rows: int = 4  # and the rows of each, at least


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _rms_norm_fwd_kernel(
    x_ptr, stride_x, residual_ptr, stride_residual, weight_ptr, out_ptr, total_ptr, num_rows, eps,
    C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.arange(0, BLOCK_C)[None]
    mask = (row < num_rows) & (channel < C)
    x = tl.load(x_ptr + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + row * stride_residual + channel
        x += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        total = round_to(x, DTYPE, INTERPRETED)
        tl.store(total_ptr + row * C + channel, total, mask=mask)
        x = total.to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        out *= round_to(weight, DTYPE, INTERPRETED).to(tl.float32)
    tl.store(out_ptr + row * C + channel, round_to(out, DTYPE, INTERPRETED), mask=mask)


def rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.norm.ref.rms_norm_ref`; without a residual the second result is x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x
    if residual is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, total
    rows, others = as_rows(x), out if residual is None else as_rows(residual)
    sizes = tile_sizes(rows.shape[1], config or Config())
    kernel: Any = _rms_norm_fwd_kernel
    with torch.cuda.device_of(x):
        kernel[(-(-len(rows) // sizes["BLOCK_R"]),)](
            rows, rows.stride(0), others, others.stride(0),
            out if weight is None else weight.contiguous(), out, total, len(rows), eps,
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            INTERPRETED=knobs.runtime.interpret, **sizes,
        )  # fmt: skip
    return out, total


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, c] with neighbouring channels, a copy only where it does not lie so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def tile_sizes(c: int, config: Config) -> dict[str, Any]:
    """Constants and launch options of a program with all channels of some rows."""
    block_c: int = 1 << (c - 1).bit_length()
    block_r = max(1, config.elements // block_c)
    num_warps = min(max(1, block_r * block_c // config.elements_per_warp), config.max_warps)
    blocks = {"C": c, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return blocks | launch_options(num_warps, 1)


def compile_case(
    name: str, kernel: Any, sizes: Mapping[str, Any], constants: Mapping[str, Any]
) -> CompileCase:
    """A launch with `tile_sizes` over bf16 rows and fp32 weights."""
    names = kernel.arg_names
    half = [x for x in names if x.endswith("_ptr") and x not in ("weight_ptr", "partial_ptr")]
    signature = {**dict.fromkeys(half, "*bf16"), "weight_ptr": "*fp32", "partial_ptr": "*fp32"}
    signature |= {"num_rows": "i32", "rows_per_part": "i32", "eps": "fp32"}
    own = {x: value for x, value in {**sizes, **constants}.items() if x in names}
    return CompileCase(
        name=f"rms_norm {name}",
        kernel=kernel,
        signature=signature | dict.fromkeys(own, "constexpr"),
        constexprs=own,
        num_warps=sizes["num_warps"],
        num_stages=1,
    )


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 4096 and of 512 channels, with all there is."""
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "INTERPRETED": False}
    return [
        compile_case(
            f"forward {c}", _rms_norm_fwd_kernel, tile_sizes(c, Config()),
            flags | {"stride_x": c, "stride_residual": c},
        )
        for c in (SHIPPED_CHANNELS, 512)
    ]  # fmt: skip

"""Triton kernel for root-mean-square normalisation, backward.

A program takes some rows in turn and all their channels: the gradient of the weight stays in its
registers until it has seen them all. The parts are added up in a fixed order.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.norm.portable import (
    SHIPPED_CHANNELS,
    Config,
    as_rows,
    compile_case,
    tile_sizes,
)
from model1.ops.partial_sums import sum_parts
from model1.ops.rounding import round_to


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "eps"])
def _rms_norm_bwd_kernel(
    grad_ptr, stride_grad, d_total_ptr, stride_d_total, x_ptr, stride_x, weight_ptr,
    d_x_ptr, partial_ptr, num_rows, rows_per_part, eps,
    C: tl.constexpr, HAS_D_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # y = x / rms, g = grad weight:  d_x = (g - y mean(g y)) / rms + d_total
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)[None]
    d_weight = tl.zeros((1, BLOCK_C), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        weight = round_to(weight, DTYPE, INTERPRETED).to(tl.float32)
    count = tl.minimum(num_rows - part * rows_per_part, rows_per_part)
    for start in range(0, count, BLOCK_R):
        offset = start + tl.arange(0, BLOCK_R)[:, None]
        row = part * rows_per_part + offset
        mask = (offset < count) & (channel < C)
        x = tl.load(x_ptr + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
        grad_at = grad_ptr + row * stride_grad + channel
        g = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        y = x * rstd
        if HAS_WEIGHT:
            # a row that does not exist is 0 / 0 for an eps of 0
            d_weight += tl.sum(tl.where(mask, g * y, 0.0), axis=0)[None]
            g *= weight
        mean = (tl.sum(g * y, axis=1) / C)[:, None]
        d_x = (g - y * mean) * rstd
        if HAS_D_TOTAL:
            d_total_at = d_total_ptr + row * stride_d_total + channel
            d_x += tl.load(d_total_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + row * C + channel, round_to(d_x, DTYPE, INTERPRETED), mask=mask)
    if HAS_WEIGHT:
        tl.store(partial_ptr + part * C + channel, d_weight, mask=channel < C)


def rms_norm_backward_triton(
    grad: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.norm.ref.rms_norm_backward_ref`."""
    config = config or Config()
    d_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    d_weight = torch.empty(0, dtype=total.dtype, device=total.device)
    if weight is not None:
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=total.device)
    if d_x.numel() == 0:
        return d_x, d_weight.zero_()
    x, grad = as_rows(total), as_rows(grad)
    others = grad if d_total is None else as_rows(d_total)
    num_rows, c = x.shape
    rows_per_part = max(config.min_rows, -(-num_rows // config.num_parts))
    num_parts = -(-num_rows // rows_per_part)
    shape = (num_parts, c) if weight is not None else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=total.device)
    kernel: Any = _rms_norm_bwd_kernel
    with torch.cuda.device_of(x):
        kernel[(num_parts,)](
            grad, grad.stride(0), others, others.stride(0), x, x.stride(0),
            partial if weight is None else weight.contiguous(), d_x, partial,
            num_rows, rows_per_part, eps,
            HAS_D_TOTAL=d_total is not None, HAS_WEIGHT=weight is not None,
            INTERPRETED=knobs.runtime.interpret, **tile_sizes(c, config),
        )  # fmt: skip
        if weight is not None:
            sum_parts(partial, d_weight)
    return d_x, d_weight


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 4096 and of 512 channels, with all there is."""
    flags = {"HAS_D_TOTAL": True, "HAS_WEIGHT": True, "INTERPRETED": False}
    return [
        compile_case(
            f"backward {c}", _rms_norm_bwd_kernel, tile_sizes(c, Config()),
            flags | {"stride_grad": c, "stride_d_total": c, "stride_x": c},
        )
        for c in (SHIPPED_CHANNELS, 512)
    ]  # fmt: skip

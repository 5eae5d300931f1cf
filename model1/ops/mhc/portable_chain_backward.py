"""Triton kernels for two sublayers' seam, backward.

The gradient of the collapse walks over the tokens of its program and adds up that of the norm's
weight. That of the write-back first adds to the streams' gradient what comes from the coefficients,
a matrix of rank n*n + 2n and a multiple of the stream, and then is the unfused one: both at once
need a product's layout and a load's at the same time, and Triton 3.6 runs out of registers.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import num_sms
from model1.ops.mhc.portable import SHIPPED, compile_case, with_adjacent_channels
from model1.ops.mhc.portable_backward import product_gradient, stream_gradient
from model1.ops.mhc.portable_chain import row_launch
from model1.ops.mhc.portable_streams import (
    mhc_write_back_backward_triton,
    numbers,
    streams,
    weighted_sum,
)
from model1.ops.rounding import round_to

# Not measured yet. Fewer channels than forward, for a thread keeps them of every stream.
CHANNELS_PER_THREAD = 8
COLLAPSE_PROGRAMS_PER_SM = 1  # that run at once


@triton.jit(do_not_specialize=["t"])
def _collapse_norm_bwd_kernel(
    grad_ptr, passed_ptr, x_ptr, stride_x_t, stride_x_n, pre_ptr, weight_ptr,
    d_x_ptr, d_pre_ptr, d_weight_ptr, t, norm_eps,
    N: tl.constexpr, C: tl.constexpr, IS_PASSED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # d_weight [programs, C]
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_C,), tl.float32)
    for index in range(tl.program_id(0), t, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        pre = numbers(pre_ptr + token * N, 0, 1, N)
        x = streams(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
        grad = tl.load(grad_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        collapsed = weighted_sum(x, pre, N)
        rstd = tl.rsqrt(tl.sum(collapsed * collapsed, axis=0) / C + norm_eps)
        normed = collapsed * rstd
        d_weight += grad * normed
        grad *= weight
        along = tl.sum(grad * normed, axis=0) / C
        grad = (grad - along * normed) * rstd
        for i in tl.static_range(N):
            tl.store(d_pre_ptr + token * N + i, tl.sum(grad * x[i], axis=0))
            d_x = grad * pre[i]
            at = (token * N + i) * C + channel
            if IS_PASSED:
                d_x += tl.load(passed_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_x_ptr + at, round_to(d_x, DTYPE, INTERPRETED), mask=inside)
    tl.store(d_weight_ptr + tl.program_id(0) * C + channel, d_weight, mask=inside)


def mhc_collapse_norm_backward_triton(
    grad: Tensor, passed: Tensor | None, x: Tensor, pre: Tensor, weight: Tensor, *, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, pre and weight from contiguous ones; see `mhc_collapse_norm_backward_ref`."""
    t, n, c = x.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    d_pre = torch.empty(t, n, dtype=torch.float32, device=x.device)
    num_programs = min(t, COLLAPSE_PROGRAMS_PER_SM * num_sms(x.device))
    d_weight = torch.empty(num_programs, c, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants, options = row_launch(n, c, CHANNELS_PER_THREAD)
        kernel: Any = _collapse_norm_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(num_programs,)](
                grad, grad if passed is None else passed, x, x.stride(0), x.stride(1),
                pre.contiguous(), weight.contiguous(), d_x, d_pre, d_weight, t, norm_eps,
                IS_PASSED=passed is not None, **constants, **options,
            )  # fmt: skip
    return d_x, d_pre.to(pre.dtype), d_weight.sum(0).to(weight.dtype)


def mhc_write_back_coefficients_backward_triton(
    d_out: Tensor, d_pre: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    out: Tensor, saved: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of `mhc_write_back_coefficients_backward_ref`, from contiguous gradients."""
    d_product, d_scale, d_bias = product_gradient(
        (d_pre, d_post, d_comb), out.shape, scale, bias, saved, iters=iters, eps=eps
    )
    total, d_phi = stream_gradient(out, phi, d_product, passed=d_out)
    through = mhc_write_back_backward_triton(total, x, y, post, comb)
    return *through, d_phi, d_scale, d_bias


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gradients of four streams of 4096 channels."""
    constants, options = row_launch(*SHIPPED, CHANNELS_PER_THREAD)
    constants |= {"IS_PASSED": True, "INTERPRETED": False}
    name, kernel = "collapse and norm backward", _collapse_norm_bwd_kernel
    return [compile_case(name, kernel, constants, **options)]

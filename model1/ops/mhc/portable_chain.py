"""Triton kernels for two sublayers' seam, forward: see `model1.ops.mhc.chain`.

`_collapse_norm_fwd_kernel` holds all channels of a token's collapse, whose root mean square it
needs. Write-back and coefficients run one after the other: a kernel that multiplied the streams by
phi before it stored them was never faster than the two (docs/log.md, 2026-12-01).
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportArgumentType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable import (
    SHIPPED,
    compile_case,
    mhc_coefficients_triton,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_streams import (
    mhc_write_back_triton,
    numbers,
    streams,
    weighted_sum,
)
from model1.ops.rounding import round_to

# Of one thread of a program that holds a whole token, as far as MAX_WARPS allows.
CHANNELS_PER_THREAD = 16
MAX_WARPS = 16


@triton.jit
def _collapse_norm_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, pre_ptr, weight_ptr, out_ptr, norm_eps,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    x = streams(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    out = weighted_sum(x, numbers(pre_ptr + token * N, 0, 1, N), N)
    rstd = tl.rsqrt(tl.sum(out * out, axis=0) / C + norm_eps)
    out = round_to(out * rstd * weight, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + token * C + channel, out, mask=inside)


def mhc_collapse_norm_triton(x: Tensor, pre: Tensor, weight: Tensor, *, norm_eps: float) -> Tensor:
    """See `model1.ops.mhc.chain.mhc_collapse_norm`."""
    check_kernel_streams(x)
    t, n, c = x.shape
    out = torch.empty(t, c, dtype=x.dtype, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants, options = row_launch(n, c)
        kernel: Any = _collapse_norm_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(t,)](
                x, x.stride(0), x.stride(1), pre.contiguous(), weight.contiguous(), out, norm_eps,
                **constants, **options,
            )  # fmt: skip
    return out


def mhc_enter_triton(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, post, comb and pre, then what the gradient needs of the coefficients."""
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    pre, post, comb, saved = mhc_coefficients_triton(x, phi, scale, bias, **options)
    return mhc_collapse_norm_triton(x, pre, weight, norm_eps=norm_eps), post, comb, pre, saved


def mhc_seam_triton(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """New streams, u, post, comb and pre, then what the gradient needs of the coefficients."""
    check_kernel_streams(x)
    out = mhc_write_back_triton(x, y, post, comb)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    return out, *mhc_enter_triton(out, phi, scale, bias, weight, **options)


def row_launch(
    n: int, c: int, channels_per_thread: int = CHANNELS_PER_THREAD
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel that holds all channels of a token."""
    block_c = max(32, triton.next_power_of_2(c))
    num_warps = max(1, min(MAX_WARPS, block_c // (32 * channels_per_thread)))
    constants = {"N": n, "C": c, "INTERPRETED": knobs.runtime.interpret, "BLOCK_C": block_c}
    return constants, launch_options(num_warps, 1)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels."""
    constants, options = row_launch(*SHIPPED)
    constants["INTERPRETED"] = False
    return [compile_case("collapse and norm", _collapse_norm_fwd_kernel, constants, **options)]

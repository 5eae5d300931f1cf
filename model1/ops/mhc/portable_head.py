"""Triton kernels for the exit's weights: `pre` alone, forward and backward.

The products with phi and their gradient are the projection's of the coefficients, which takes any
number of columns; here is what lies between a token's products and its weights.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.mhc.portable import (
    SHIPPED,
    block_width,
    compile_case,
    project,
)
from model1.ops.mhc.portable_backward import stream_gradient
from model1.ops.mhc.portable_rounds import vector_columns

NUMBERS = 256  # per program of one warp, over as many tokens as that gives; not measured


@triton.jit
def _logits(z, scale_ptr, bias_ptr, j, is_j):
    """z [BLOCK_T, SIZE] times the one scale plus the bias of its column."""
    bias = tl.load(bias_ptr + j, mask=is_j, other=0.0).to(tl.float32)
    return z * tl.load(scale_ptr).to(tl.float32) + bias


@triton.jit(do_not_specialize=["t"])
def _head_kernel(
    parts_ptr, scale_ptr, bias_ptr, pre_ptr, saved_ptr, t, eps, norm_eps,
    N: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # saved [t, N + 1]: the products over the rms, then one over the rms
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j, is_j = vector_columns(N, SIZE)
    is_token = token < t
    is_vector = is_token[:, None] & is_j
    square = tl.zeros((BLOCK_T,), tl.float32)
    z = tl.zeros((BLOCK_T, SIZE), tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts_ptr + (split * t.to(tl.int64) + token) * BLOCK_W
        square += tl.load(part + N, mask=is_token, other=0.0)
        z += tl.load(part[:, None] + j, mask=is_vector, other=0.0)
    rstd = tl.rsqrt(square / (N * C) + norm_eps)
    z *= rstd[:, None]
    saved = saved_ptr + token * (N + 1)
    tl.store(saved + N, rstd, mask=is_token)
    tl.store(saved[:, None] + j, z, mask=is_vector)
    pre = tl.sigmoid(_logits(z, scale_ptr, bias_ptr, j, is_j)) + eps
    tl.store(pre_ptr + token[:, None] * N + j, pre, mask=is_vector)


@triton.jit(do_not_specialize=["t"])
def _head_bwd_kernel(
    d_pre_ptr, saved_ptr, scale_ptr, bias_ptr, d_product_ptr, spread_ptr, d_scale_ptr, d_bias_ptr,
    t,
    N: tl.constexpr, C: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # d_product [t, BLOCK_W]: of phi x; spread [t]: what x itself is multiplied by. d_scale
    # [programs], d_bias [programs, N].
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j, is_j = vector_columns(N, SIZE)
    is_token = token < t
    is_vector = is_token[:, None] & is_j
    saved = saved_ptr + token * (N + 1)
    rstd = tl.load(saved + N, mask=is_token, other=0.0)
    z = tl.load(saved[:, None] + j, mask=is_vector, other=0.0)
    weight = tl.sigmoid(_logits(z, scale_ptr, bias_ptr, j, is_j))
    grad = tl.load(d_pre_ptr + token[:, None] * N + j, mask=is_vector, other=0.0)
    grad *= weight * (1.0 - weight)
    tl.store(d_bias_ptr + tl.program_id(0) * N + j, tl.sum(grad, axis=0)[None], mask=is_j)
    along = tl.sum(grad * z, axis=1)
    tl.store(d_scale_ptr + tl.program_id(0), tl.sum(along, axis=0))
    factor = tl.load(scale_ptr).to(tl.float32) * rstd
    product = d_product_ptr + token * BLOCK_W
    tl.store(product[:, None] + j, grad * factor[:, None], mask=is_vector)
    tl.store(spread_ptr + token, -along * factor * rstd / (N * C), mask=is_token)


def mhc_head_triton(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """`model1.ops.mhc.mhc_head`, and what the gradient needs: see `_head_kernel`."""
    t, n, c = x.shape
    parts = project(x, phi)
    pre = torch.empty(t, n, dtype=torch.float32, device=x.device)
    saved = torch.empty(t, n + 1, dtype=torch.float32, device=x.device)
    if t > 0:
        constants = _constants(n, c)
        kernel: Any = _head_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-t // constants["BLOCK_T"]),)](
                parts, scale.contiguous(), bias.contiguous(), pre, saved, t, eps, norm_eps,
                SPLITS=len(parts), **constants, **launch_options(1, 1),
            )  # fmt: skip
    return pre, saved


def mhc_head_backward_triton(
    d_pre: Tensor, x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, saved: Tensor, *,
    eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, phi, scale and bias from a contiguous one; see `mhc_head_backward_ref`."""
    (t, n, c), device = x.shape, x.device
    constants = _constants(n, c)
    num_programs = -(-t // constants["BLOCK_T"])
    d_product = torch.empty(t, constants["BLOCK_W"], dtype=torch.float32, device=device)
    spread = torch.empty(t, dtype=torch.float32, device=device)
    d_scale = torch.empty(num_programs, 1, dtype=torch.float32, device=device)
    d_bias = torch.empty(num_programs, n, dtype=torch.float32, device=device)
    if t > 0:
        kernel: Any = _head_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(num_programs,)](
                d_pre, saved, scale.contiguous(), bias.contiguous(), d_product, spread, d_scale,
                d_bias, t, **constants, **launch_options(1, 1),
            )  # fmt: skip
    d_x, d_phi = stream_gradient(x, phi, d_product, spread)
    return d_x, d_phi, d_scale.sum(0).to(scale.dtype), d_bias.sum(0).to(bias.dtype)


def _constants(n: int, c: int) -> dict[str, Any]:
    size = triton.next_power_of_2(n)
    return {"N": n, "C": c, "SIZE": size, "BLOCK_T": NUMBERS // size, "BLOCK_W": block_width(n)}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The exit from four streams of 4096 channels, without its projection."""
    constants, cases = _constants(*SHIPPED), []
    for name, splits in (("many tokens", 4), ("few tokens", 16)):
        launch = constants | {"SPLITS": splits}
        cases.append(compile_case(f"head {name}", _head_kernel, launch, 1))
    return [*cases, compile_case("head backward", _head_bwd_kernel, constants, 1)]

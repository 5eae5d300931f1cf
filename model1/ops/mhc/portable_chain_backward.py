"""Triton kernels for two sublayers' seam, backward.

The gradient of the collapse walks over the tokens of its program and adds up that of the norm's
weight. A token takes six sums over all its threads, one after another; meanwhile the next one's
streams arrive in shared memory. That of the write-back first adds to the streams' gradient what
comes from the coefficients, a matrix of rank n*n + 2n and a multiple of the stream, and then is the
unfused one: both at once need a product's layout and a load's at the same time, and Triton 3.6 runs
out of registers.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none
# pyright: reportArgumentType=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import device_target, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    compile_case,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_backward import product_gradient, stream_gradient
from model1.ops.mhc.portable_chain import row_launch
from model1.ops.mhc.portable_streams import (
    mhc_write_back_backward_triton,
    numbers,
    tiles,
)
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class RowConfig:
    """How the collapse's gradient is cut: num_stages - 1 tokens of a program are on their way."""

    channels_per_thread: int
    num_stages: int
    programs_per_sm: int  # that run at once


# With 8192 tokens of 4 x 4096 on an H200, 2026-12-01: 265 us; one stage more 240, which is to be
# tried in the whole step. Fewer channels a thread than forward, for it keeps them of every stream.
# 74 KB of four bf16 streams of 4096 channels on their way to each SM while a token is computed
ROWS = RowConfig(channels_per_thread=8, num_stages=2, programs_per_sm=1)
SCRATCH_BYTES = 17 << 10  # of shared memory, for sums


@triton.jit
def pinned(x, REGISTER: tl.constexpr):
    """x itself, by an operation that the compiler does not repeat in another layout.

    REGISTER: a letter of `register_kind`; "" pins nothing.
    """
    if REGISTER == "":
        return x
    return tl.inline_asm_elementwise(
        "", "=" + REGISTER + ",0", [x], dtype=x.dtype, is_pure=False,
        pack=32 // x.dtype.primitive_bitwidth,
    )  # fmt: skip


@triton.jit
def weighted(x, weights, N: tl.constexpr):
    """`weighted_sum` of tiles in their own dtype."""
    total = x[0].to(tl.float32) * weights[0]
    for i in tl.static_range(1, N):
        total = tl.fma(x[i].to(tl.float32), weights[i].broadcast_to(total.shape), total)
    return total


@triton.jit(do_not_specialize=["t"])
def _collapse_norm_bwd_kernel(
    grad_ptr, passed_ptr, x_ptr, stride_x_t, stride_x_n, pre_ptr, weight_ptr,
    d_x_ptr, d_pre_ptr, d_weight_ptr, t, norm_eps,
    N: tl.constexpr, C: tl.constexpr, IS_PASSED: tl.constexpr, REGISTER: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # d_weight [programs, C]
    INTERPRETED: tl.constexpr = REGISTER == ""
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_C,), tl.float32)
    for index in tl.range(tl.program_id(0), t, tl.num_programs(0), num_stages=STAGES):
        token = tl.cast(index, tl.int64)
        pre = numbers(pre_ptr + token * N, 0, 1, N)
        x = tiles(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
        grad = tl.load(grad_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        collapsed = weighted(x, pre, N)
        rstd = tl.rsqrt(tl.sum(collapsed * collapsed, axis=0) / C + norm_eps)
        normed = collapsed * rstd
        d_weight += grad * normed
        grad *= weight
        along = tl.sum(grad * normed, axis=0) / C
        grad = (grad - along * normed) * rstd
        for i in tl.static_range(N):
            # pinned, so that x does not stay in fp32 from above on
            wide = pinned(x[i], REGISTER).to(tl.float32)
            tl.store(d_pre_ptr + token * N + i, tl.sum(grad * wide, axis=0))
            d_x = grad * pre[i]
            at = (token * N + i) * C + channel
            if IS_PASSED:
                d_x += tl.load(passed_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_x_ptr + at, round_to(d_x, DTYPE, INTERPRETED), mask=inside)
    tl.store(d_weight_ptr + tl.program_id(0) * C + channel, d_weight, mask=inside)


def mhc_collapse_norm_backward_triton(
    grad: Tensor, passed: Tensor | None, x: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float, config: RowConfig = ROWS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, pre and weight from contiguous ones; see `mhc_collapse_norm_backward_ref`."""
    t, n, c = x.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    d_pre = torch.empty(t, n, dtype=torch.float32, device=x.device)
    num_programs = min(t, config.programs_per_sm * num_sms(x.device))
    d_weight = torch.empty(num_programs, c, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        target = device_target(x.device)
        constants, options = row_constants(n, c, x.element_size(), config, target)
        kernel: Any = _collapse_norm_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(num_programs,)](
                grad, grad if passed is None else passed, x, x.stride(0), x.stride(1),
                pre.contiguous(), weight.contiguous(), d_x, d_pre, d_weight, t, norm_eps,
                IS_PASSED=passed is not None, **constants, **options,
            )  # fmt: skip
    return d_x, d_pre.to(pre.dtype), d_weight.sum(0).to(weight.dtype)


def row_constants(
    n: int, c: int, element_bytes: int, config: RowConfig, target: KernelTarget
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the collapse's gradient; its stages as shared memory allows."""
    constants, options = row_launch(n, c, config.channels_per_thread)
    del constants["INTERPRETED"]
    token_bytes = (2 * n + 1) * constants["BLOCK_C"] * element_bytes
    free_bytes = shared_bytes(target) - SCRATCH_BYTES
    stages = max(1, min(config.num_stages, 1 + free_bytes // token_bytes))
    return constants | {"REGISTER": register_kind(target), "STAGES": stages}, options


def shared_bytes(target: KernelTarget) -> int:
    """Shared memory that a program may take; 0 where copies to it do not pass by registers."""
    if target.kind == "hip":
        return 0
    return {80: 166912, 90: 232448, 100: 232448}.get(int(target.arch), 101376)


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


def register_kind(target: KernelTarget) -> str:
    """How the target's assembler calls a register of 32 bits, nothing if there is none."""
    if knobs.runtime.interpret:
        return ""
    return "v" if target.kind == "hip" else "r"


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gradients of four streams of 4096 channels."""
    constants, options = row_constants(*SHIPPED, 2, ROWS, target)
    constants["REGISTER"] = register_kind(target)
    constants["IS_PASSED"] = True
    name, kernel = "collapse and norm backward", _collapse_norm_bwd_kernel
    return [compile_case(name, kernel, constants, **options)]

"""Triton kernel for the gradient of collapse and norm: see `model1.ops.mhc.chain`.

Whole, or only what sums over all channels of a token, for kernels that make the streams' gradient
themselves. A program walks over its tokens, each in registers from its one load to its stores, and
adds up the gradient of the norm's weight. A token's sums are taken at once: what the norm's
gradient subtracts is linear in them.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none
# pyright: reportArgumentType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import device_target, launch_options, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    compile_case,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_chain import row_launch
from model1.ops.mhc.portable_streams import (
    LOAD_BYTES,
    NARROW,
    numbers,
    run_sum,
    tiles,
    weighted_sum,
)
from model1.ops.rounding import round_to

# Of a thread of a program that holds a token over all its warps. With 8192 tokens of 4 x 4096 on an
# H200, 2026-12-01: 270 us, and 134 without the streams' gradient; with 8 channels, the next token
# on its way and a program an SM 322 and 251; with 32 channels and that 242 and 137, but then
# registers spill on sm_120.
CHANNELS_PER_THREAD = 16
PROGRAMS_PER_SM = 4
# A warp that takes a whole token holds it in pieces of what one load of its threads brings. With
# 65,536 tokens of 4 x 768: 8, 12, 14, 16, 20 and 24 programs an SM take 163, 143, 192, 179, 157 and
# 146 us without the streams' gradient, 587, 450, 417, 402, 507 and 458 with it.
PIECE = 256
NARROW_PROGRAMS_PER_SM = 12


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


@triton.jit(do_not_specialize=["t"])
def _collapse_norm_bwd_kernel(
    grad_ptr, passed_ptr, x_ptr, stride_x_t, stride_x_n, pre_ptr, weight_ptr,
    d_x_ptr, d_pre_ptr, stats_ptr, d_weight_ptr, t, norm_eps,
    N: tl.constexpr, C: tl.constexpr, HAS_D_X: tl.constexpr, IS_PASSED: tl.constexpr,
    REGISTER: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # stats [t, 2]: one over the root mean square, and the part of the norm's gradient along its
    # result. d_weight [programs, C].
    INTERPRETED: tl.constexpr = REGISTER == ""
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    PIECES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    d_weight, weight = (), ()  # the latter here, or every token's would pass through stages
    for piece in tl.static_range(PIECES):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        d_weight += (tl.zeros((BLOCK_C,), tl.float32),)
        value = tl.load(weight_ptr + channel, mask=channel < C, other=0.0)
        weight += (value.to(tl.float32),)
    for index in range(tl.program_id(0), t, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        pre = numbers(pre_ptr + token * N, 0, 1, N)
        x, grad = (), ()
        for piece in tl.static_range(PIECES):
            channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
            x += tiles(x_ptr + token * stride_x_t, stride_x_n, channel, channel < C, N)
            grad += (tl.load(grad_ptr + token * C + channel, mask=channel < C, other=0.0),)
        sums = ()  # of collapsed by itself and by the gradient, then of each stream by both
        for _ in tl.static_range(2 + 2 * N):
            sums += (tl.zeros((BLOCK_C // RUN,), tl.float32),)
        for piece in tl.static_range(PIECES):
            scaled = grad[piece].to(tl.float32) * weight[piece]
            collapsed = weighted_sum(x[piece * N : piece * N + N], pre, N)
            new = (sums[0] + run_sum(collapsed, collapsed, RUN),)
            new += (sums[1] + run_sum(collapsed, scaled, RUN),)
            for i in tl.static_range(N):
                wide = x[piece * N + i].to(tl.float32)
                new += (sums[2 + 2 * i] + run_sum(wide, scaled, RUN),)
                new += (sums[3 + 2 * i] + run_sum(wide, collapsed, RUN),)
            sums = new
        rstd = tl.rsqrt(tl.sum(sums[0], axis=0) / C + norm_eps)
        along = tl.sum(sums[1], axis=0) * rstd / C
        drop = along * rstd * rstd
        for i in tl.static_range(N):
            d_pre = tl.sum(sums[2 + 2 * i], axis=0) * rstd
            tl.store(d_pre_ptr + token * N + i, d_pre - drop * tl.sum(sums[3 + 2 * i], axis=0))
        if not HAS_D_X:
            tl.store(stats_ptr + 2 * token, rstd)
            tl.store(stats_ptr + 2 * token + 1, along)
        new_weight = ()
        for piece in tl.static_range(PIECES):
            channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = channel < C
            again = ()
            for i in tl.static_range(N):
                # pinned, so that x does not stay in fp32 from above on
                again += (pinned(x[piece * N + i], REGISTER),)
            collapsed = weighted_sum(again, pre, N)
            d_u = pinned(grad[piece], REGISTER).to(tl.float32)
            new_weight += (d_weight[piece] + d_u * (collapsed * rstd),)
            if HAS_D_X:
                d_collapsed = d_u * weight[piece] * rstd - collapsed * drop
                for i in tl.static_range(N):
                    d_x = d_collapsed * pre[i]
                    at = (token * N + i) * C + channel
                    if IS_PASSED:
                        d_x += tl.load(passed_ptr + at, mask=inside, other=0.0).to(tl.float32)
                    tl.store(d_x_ptr + at, round_to(d_x, DTYPE, INTERPRETED), mask=inside)
        d_weight = new_weight
    for piece in tl.static_range(PIECES):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        at = d_weight_ptr + tl.program_id(0) * C + channel
        tl.store(at, d_weight[piece], mask=channel < C)


def mhc_collapse_norm_backward_triton(
    grad: Tensor, passed: Tensor | None, x: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, pre and weight from contiguous ones; see `mhc_collapse_norm_backward_ref`."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_pre, d_weight = _launch(grad, passed, x, pre, weight, d_x, norm_eps)
    return d_x, d_pre, d_weight


def collapse_gradient(
    grad: Tensor, x: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre and weight; between them `stats`, [t, 2], which that of x is made with."""
    stats = torch.empty(len(x), 2, dtype=torch.float32, device=x.device)
    d_pre, d_weight = _launch(grad, None, x, pre, weight, stats, norm_eps)
    return d_pre, stats, d_weight


def _launch(
    grad: Tensor, passed: Tensor | None, x: Tensor, pre: Tensor, weight: Tensor, result: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of pre and weight; result, d_x [t, n, c] or stats [t, 2], is written."""
    t, n, c = x.shape
    has_d_x = result.dim() == 3
    d_pre = torch.empty(t, n, dtype=torch.float32, device=x.device)
    constants, options, programs_per_sm = row_constants(
        n, c, x.element_size(), device_target(x.device)
    )
    num_programs = min(t, programs_per_sm * num_sms(x.device))
    d_weight = torch.empty(num_programs, c, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        kernel: Any = _collapse_norm_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(num_programs,)](
                grad, grad if passed is None else passed, x, x.stride(0), x.stride(1),
                pre.contiguous(), weight.contiguous(), result if has_d_x else grad, d_pre, result,
                d_weight, t, norm_eps, HAS_D_X=has_d_x, IS_PASSED=passed is not None,
                **constants, **options,
            )  # fmt: skip
    return d_pre.to(pre.dtype), d_weight.sum(0).to(weight.dtype)


def row_constants(
    n: int, c: int, element_bytes: int, target: KernelTarget
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Constants, options and programs an SM of the collapse's gradient.

    A program holds a token over all its warps or, of few channels, in one.
    """
    constants: dict[str, Any] = {"N": n, "C": c, "RUN": LOAD_BYTES // element_bytes}
    constants["REGISTER"] = register_kind(target)
    if c <= NARROW:
        constants["BLOCK_C"] = max(32, min(PIECE, triton.next_power_of_2(c)))
        return constants, launch_options(1, 1), NARROW_PROGRAMS_PER_SM
    sizes, options = row_launch(n, c, CHANNELS_PER_THREAD)
    return constants | {"BLOCK_C": sizes["BLOCK_C"]}, options, PROGRAMS_PER_SM


def register_kind(target: KernelTarget) -> str:
    """How the target's assembler calls a register of 32 bits, nothing if there is none."""
    if knobs.runtime.interpret:
        return ""
    return "v" if target.kind == "hip" else "r"


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gradients of four streams of 4096 channels, and of 768."""
    cases = []
    for c, size in ((SHIPPED[1], ""), (768, " of few channels")):
        constants, options, _ = row_constants(SHIPPED[0], c, 2, target)
        constants["REGISTER"] = register_kind(target)
        for name, has_d_x in (("collapse and norm backward", True), ("collapse's sums", False)):
            constants |= {"HAS_D_X": has_d_x, "IS_PASSED": has_d_x}
            cases.append(
                compile_case(name + size, _collapse_norm_bwd_kernel, dict(constants), **options)
            )
    return cases

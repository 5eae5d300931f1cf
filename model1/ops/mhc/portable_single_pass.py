"""Triton kernel that writes the streams back and collapses them in one pass, and its gradient.

A program holds whole tokens, in tiles [tokens, channels] of which a thread loads 16 bytes at once:
where a few such pieces make up a token, one warp has it to itself, and no sum over its channels
leaves the warp. Wider tokens have several warps each. A piece's new streams are stored at once;
only their collapse waits for the root mean square.

Backward it is a seam whose coefficients come from elsewhere: see `portable_seam_backward`.
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
from model1.ops.launch import launch_options
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable import SHIPPED, compile_case, with_adjacent_channels
from model1.ops.mhc.portable_chain_backward import (
    collapse_gradient,
    mhc_collapse_norm_backward_triton,
)
from model1.ops.mhc.portable_rounds_backward import token_columns
from model1.ops.mhc.portable_seam_backward import SeamGradients, is_fused, write_back_gradient
from model1.ops.mhc.portable_streams import (
    LOAD_BYTES,
    mhc_write_back_backward_triton,
    tiles,
    weighted_sum,
)
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class PassConfig:
    """How tokens are cut."""

    pieces: int  # of a token in one thread, as far as warps allow
    max_warps: int  # of a token
    warps: int  # of a program at least: as many tokens as have a warp each


# On an H200, 2026-12-01: 95, 93 and 89 % of a copy with 4 x 768, 4,096 and 7,168 channels; with 2
# pieces 87, 95 and 74, with 8 95, 73 and 90.
FORWARD = PassConfig(pieces=4, max_warps=16, warps=4)


@triton.jit
def _norm_weight(ptr, channel, BLOCK_T: tl.constexpr, C: tl.constexpr):
    """The norm's weight, once for every token: as a row it would lie with other threads."""
    at = tl.broadcast_to(ptr + channel, (BLOCK_T, channel.shape[1]))
    return tl.load(at, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def _wide(values, N: tl.constexpr):
    """Tiles in fp32."""
    new = ()
    for i in tl.static_range(N):
        new += (values[i].to(tl.float32),)
    return new


@triton.jit
def _written(x, y, post, comb, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr, N: tl.constexpr):
    """The new streams as they are stored; x and y in fp32."""
    new = ()
    for k in tl.static_range(N):
        weights = ()
        for j in tl.static_range(N):
            weights += (comb[j * N + k],)
        out = weighted_sum(x, weights, N)
        out = tl.fma(y, post[k].broadcast_to(y.shape), out)
        new += (round_to(out, DTYPE, INTERPRETED),)
    return new


@triton.jit(do_not_specialize=["t"])
def _single_pass_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, pre_ptr, weight_ptr,
    u_ptr, out_ptr, t, norm_eps,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    is_token = token < t
    post = token_columns(post_ptr + token * N, is_token, 0, N)
    comb = token_columns(comb_ptr + token * (N * N), is_token, 0, N * N)
    pre = token_columns(pre_ptr + token * N, is_token, 0, N)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    values = ()
    for piece in tl.static_range(PIECES):
        channel = (piece * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        inside = is_token & (channel < C)
        y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        x = _wide(tiles(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N), N)
        new = _written(x, y, post, comb, DTYPE, INTERPRETED, N)
        for k in tl.static_range(N):
            tl.store(out_ptr + (token * N + k) * C + channel, new[k], mask=inside)
        value = weighted_sum(_wide(new, N), pre, N)
        squares += value * value
        values += (value,)
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C + norm_eps)
    for piece in tl.static_range(PIECES):
        channel = (piece * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        weight = _norm_weight(weight_ptr, channel, BLOCK_T, C)
        u = round_to(values[piece] * rstd * weight, DTYPE, INTERPRETED)
        tl.store(u_ptr + token * C + channel, u, mask=is_token & (channel < C))


def mhc_write_back_collapse_norm_triton(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.mhc.single_pass.mhc_write_back_collapse_norm`."""
    check_kernel_streams(x)
    t, n, c = x.shape
    u = torch.empty(t, c, dtype=x.dtype, device=x.device)
    out = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants, options = pass_launch(n, c, x.element_size())
        kernel: Any = _single_pass_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-t // constants["BLOCK_T"]),)](
                x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(), comb.contiguous(),
                pre.contiguous(), weight.contiguous(), u, out, t, norm_eps,
                INTERPRETED=knobs.runtime.interpret, **constants, **options,
            )  # fmt: skip
    return u, out


def mhc_write_back_collapse_norm_backward_triton(
    grad: Tensor, passed: Tensor | None, x: Tensor, y: Tensor, post: Tensor, comb: Tensor,
    pre: Tensor, weight: Tensor, out: Tensor, *, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the six tensors, from contiguous ones of u and of the new streams, out."""
    if not is_fused(out):
        total, d_pre, d_weight = mhc_collapse_norm_backward_triton(
            grad, passed, out, pre, weight, norm_eps=norm_eps
        )
        return *mhc_write_back_backward_triton(total, x, y, post, comb), d_pre, d_weight
    passed = torch.zeros_like(out) if passed is None else passed
    d_pre, stats, d_weight = collapse_gradient(grad, out, pre, weight, norm_eps=norm_eps)
    grads = SeamGradients(grad, passed, stats)
    through = write_back_gradient(grads, x, y, post, comb, weight, out, pre)
    return *through, d_pre, d_weight


def pass_launch(n: int, c: int, element_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel whose programs hold whole tokens."""
    per_warp = 32 * max(1, LOAD_BYTES // element_bytes)
    token_warps = min(
        FORWARD.max_warps, triton.next_power_of_2(-(-c // (FORWARD.pieces * per_warp)))
    )
    block_t = max(1, FORWARD.warps // token_warps)
    constants = {"N": n, "C": c, "BLOCK_T": block_t, "BLOCK_C": token_warps * per_warp}
    return constants, launch_options(block_t * token_warps, 1)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 768 and of 4096 channels."""
    cases = []
    for c in (768, SHIPPED[1]):
        constants, options = pass_launch(4, c, 2)
        constants["INTERPRETED"] = False
        cases.append(
            compile_case(f"single pass c={c}", _single_pass_fwd_kernel, constants, **options)
        )
    return cases

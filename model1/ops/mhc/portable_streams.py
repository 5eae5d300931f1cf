"""Triton kernels that collapse and write back the streams, forward and backward.

Forward, a program takes some channels of one token from every stream; backward all of a token's
channels in turn, for the gradients of the weights are sums over them. Every input is read once,
every result written once. A token's weights are single numbers that all threads hold.
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
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable import SHIPPED, compile_case, with_adjacent_channels
from model1.ops.rounding import round_to

LOAD_BYTES = 16  # of one thread's load; backward sums stay in its thread that far
# Not measured against others. More streams leave a thread fewer registers for each.
MAX_WARPS = 4
WIDE_STREAMS = 4
# Up to so many channels backward a warp takes a whole token: its sums need no shared memory.
NARROW = 1024


@triton.jit
def numbers(ptr, FIRST: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    """N single numbers, in fp32."""
    values = ()
    for i in tl.static_range(N):
        values += (tl.load(ptr + FIRST + i * STEP).to(tl.float32),)
    return values


@triton.jit
def streams(ptr, stride, offset, mask, N: tl.constexpr):
    """The same channels of every stream, in fp32."""
    values = ()
    for _ in tl.static_range(N):
        values += (tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32),)
        ptr += stride  # a multiple of it may not fit 32 bits
    return values


@triton.jit
def tiles(ptr, stride, offset, mask, N: tl.constexpr):
    """The same channels of every stream, in their own dtype."""
    values = ()
    for _ in tl.static_range(N):
        values += (tl.load(ptr + offset, mask=mask, other=0.0),)
        ptr += stride  # a multiple of it may not fit 32 bits
    return values


@triton.jit
def weighted_sum(values, weights, N: tl.constexpr):
    """Values of any dtype by weights, added in their order in fp32."""
    total = values[0].to(tl.float32) * weights[0]
    for i in tl.static_range(1, N):
        total = tl.fma(values[i].to(tl.float32), weights[i].broadcast_to(total.shape), total)
    return total


@triton.jit
def run_sum(x, y, RUN: tl.constexpr):
    """x y, [channels / RUN]: neighbours added up, which share a thread."""
    return tl.sum(tl.reshape(x * y, (x.shape[0] // RUN, RUN)), axis=1)


@triton.jit
def add_products(sums, x, values, RUN: tl.constexpr, N: tl.constexpr):
    """sums of x times each value."""
    new = ()
    for i in tl.static_range(N):
        new += (sums[i] + run_sum(x, values[i], RUN),)
    return new


@triton.jit
def _collapse_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, pre_ptr, out_ptr,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    channel = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    x = streams(x_ptr + token * stride_x_t, stride_x_n, channel, channel < C, N)
    out = weighted_sum(x, numbers(pre_ptr + token * N, 0, 1, N), N)
    out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + token * C + channel, out, mask=channel < C)


@triton.jit
def _collapse_bwd_kernel(
    grad_ptr, x_ptr, stride_x_t, stride_x_n, pre_ptr, d_x_ptr, d_pre_ptr,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    pre = numbers(pre_ptr + token * N, 0, 1, N)
    sums = ()
    for _ in tl.static_range(N):
        sums += (tl.zeros((BLOCK_C // RUN,), tl.float32),)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < C
        grad = tl.load(grad_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        x = streams(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
        sums = add_products(sums, grad, x, RUN, N)
        for i in tl.static_range(N):
            d_x = round_to(grad * pre[i], DTYPE, INTERPRETED)
            tl.store(d_x_ptr + (token * N + i) * C + channel, d_x, mask=inside)
    for i in tl.static_range(N):
        tl.store(d_pre_ptr + token * N + i, tl.sum(sums[i], axis=0))


@triton.jit
def _write_back_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, out_ptr,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    channel = tl.program_id(0) % NUM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
    x = streams(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
    post = numbers(post_ptr + token * N, 0, 1, N)
    for k in tl.static_range(N):
        weights = numbers(comb_ptr + token * (N * N), k, N, N)
        out = weighted_sum(x, weights, N)
        out = tl.fma(y, post[k].broadcast_to(y.shape), out)
        out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + (token * N + k) * C + channel, out, mask=inside)


@triton.jit
def _write_back_bwd_kernel(
    grad_ptr, x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr,
    d_x_ptr, d_y_ptr, d_post_ptr, d_comb_ptr,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    post = numbers(post_ptr + token * N, 0, 1, N)
    # d_post, then d_comb row by row
    sums = ()
    for _ in tl.static_range(N + N * N):
        sums += (tl.zeros((BLOCK_C // RUN,), tl.float32),)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < C
        grad = streams(grad_ptr + token * (N * C), C, channel, inside, N)
        y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0).to(tl.float32)
        # all loads first: none may pass a store
        x = tiles(x_ptr + token * stride_x_t, stride_x_n, channel, inside, N)
        d_y = round_to(weighted_sum(grad, post, N), d_y_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_y_ptr + token * C + channel, d_y, mask=inside)
        new = add_products(sums[:N], y, grad, RUN, N)
        for j in tl.static_range(N):
            wide = x[j].to(tl.float32)
            new += add_products(sums[N + j * N : 2 * N + j * N], wide, grad, RUN, N)
            weights = numbers(comb_ptr + token * (N * N), j * N, 1, N)
            d_x = weighted_sum(grad, weights, N)
            d_x = round_to(d_x, d_x_ptr.dtype.element_ty, INTERPRETED)
            tl.store(d_x_ptr + (token * N + j) * C + channel, d_x, mask=inside)
        sums = new
    for k in tl.static_range(N):
        tl.store(d_post_ptr + token * N + k, tl.sum(sums[k], axis=0))
    for i in tl.static_range(N * N):
        tl.store(d_comb_ptr + token * (N * N) + i, tl.sum(sums[N + i], axis=0))


def mhc_collapse_triton(x: Tensor, pre: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_collapse`."""
    check_kernel_streams(x)
    t, n, c = x.shape
    out = torch.empty(t, c, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        x = with_adjacent_channels(x)
        constants = _constants(n, c, x.element_size())
        kernel: Any = _collapse_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(t * -(-c // constants["BLOCK_C"]),)](
                x, x.stride(0), x.stride(1), pre.contiguous(), out, **constants,
                **_options(constants, x.element_size()),
            )  # fmt: skip
    return out


def mhc_collapse_backward_triton(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and pre from a contiguous grad."""
    t, n, c = x.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    d_pre = torch.empty(t, n, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants = _constants(n, c, x.element_size(), is_backward=True)
        kernel: Any = _collapse_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(t,)](
                grad, x, x.stride(0), x.stride(1), pre.contiguous(), d_x, d_pre, **constants,
                **_options(constants, x.element_size()),
            )  # fmt: skip
    return d_x, d_pre.to(pre.dtype)


def mhc_write_back_triton(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_write_back`."""
    check_kernel_streams(x)
    t, n, c = x.shape
    out = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        x = with_adjacent_channels(x)
        constants = _constants(n, c, x.element_size())
        kernel: Any = _write_back_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(t * -(-c // constants["BLOCK_C"]),)](
                x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(),
                comb.contiguous(), out, **constants, **_options(constants, x.element_size()),
            )  # fmt: skip
    return out


def mhc_write_back_backward_triton(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, post and comb from a contiguous grad."""
    t, n, c = x.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    d_y = torch.empty(t, c, dtype=y.dtype, device=x.device)
    d_post = torch.empty(t, n, dtype=torch.float32, device=x.device)
    d_comb = torch.empty(t, n, n, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants = _constants(n, c, x.element_size(), is_backward=True)
        kernel: Any = _write_back_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(t,)](
                grad, x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(),
                comb.contiguous(), d_x, d_y, d_post, d_comb, **constants,
                **_options(constants, x.element_size()),
            )  # fmt: skip
    return d_x, d_y, d_post.to(post.dtype), d_comb.to(comb.dtype)


def _constants(n: int, c: int, element_bytes: int, *, is_backward: bool = False) -> dict[str, Any]:
    run = LOAD_BYTES // element_bytes
    if is_backward and n > WIDE_STREAMS:
        run //= 4
    warps = 1 if is_backward and c <= NARROW else MAX_WARPS
    block_c = min(warps * 32 * run, max(32, triton.next_power_of_2(c)))
    constants = {"N": n, "C": c, "INTERPRETED": knobs.runtime.interpret, "BLOCK_C": block_c}
    return constants | {"RUN": run} if is_backward else constants


def _options(constants: dict[str, Any], element_bytes: int) -> dict[str, Any]:
    """As many warps as have one load each."""
    run = constants.get("RUN", LOAD_BYTES // element_bytes)
    return launch_options(max(1, constants["BLOCK_C"] // (32 * run)), 1)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels."""
    cases = []
    for kernel, name in (
        (_collapse_fwd_kernel, "collapse"),
        (_collapse_bwd_kernel, "collapse backward"),
        (_write_back_fwd_kernel, "write back"),
        (_write_back_bwd_kernel, "write back backward"),
    ):
        constants = _constants(*SHIPPED, 2, is_backward="backward" in name)
        constants["INTERPRETED"] = False
        cases.append(compile_case(name, kernel, constants, **_options(constants, 2)))
    return cases

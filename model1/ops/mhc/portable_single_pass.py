"""Triton kernels that write the streams back and collapse them in one pass, forward and backward.

A program holds whole tokens, in tiles [tokens, channels] of which a thread loads 16 bytes at once:
where a few such pieces make up a token, one warp has it to itself, and no sum over its channels
leaves the warp. Wider tokens have several warps each.

Forward, a piece's new streams are stored at once; only their collapse waits for the root mean
square. Backward runs over a token twice: first for the norm's sums, from new streams that it
computes again, then for everything else. Where a thread's registers allow, it keeps what it loaded.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none
# pyright: reportArgumentType=none

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options, num_sms
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable import SHIPPED, compile_case, with_adjacent_channels
from model1.ops.mhc.portable_streams import WIDE_STREAMS, tiles, weighted_sum
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class PassConfig:
    """How tokens are cut. None of it is measured yet."""

    pieces: int  # of a token in one thread, as far as warps allow
    load_bytes: int  # of one thread's load
    max_warps: int  # of a token
    warps: int  # of a program at least: as many tokens as have a warp each
    programs_per_sm: int = 1  # backward: that share the norm's gradient
    kept_pieces: int = 0  # backward: of that many at most, what was loaded stays in registers


FORWARD = PassConfig(pieces=4, load_bytes=16, max_warps=16, warps=4)
# Three pieces kept, as of 768 channels, spill on sm_90; not kept, they spill 24 bytes on sm_89.
# Four that are not, as of 7168, spill 32 on sm_90, with twice the warps 384.
BACKWARD = PassConfig(
    pieces=3, load_bytes=16, max_warps=8, warps=4, programs_per_sm=4, kept_pieces=2
)
# More streams take most registers for their matrix: shorter loads, and few pieces, for the
# compiler's sake.
MANY_STREAMS = PassConfig(pieces=1, load_bytes=4, max_warps=16, warps=4, programs_per_sm=4)


@triton.jit
def _token_numbers(ptr, mask, N: tl.constexpr):
    """N adjacent numbers of every token, each [BLOCK_T, 1], in fp32."""
    values = ()
    for i in tl.static_range(N):
        values += (tl.load(ptr + i, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _norm_weight(ptr, channel, BLOCK_T: tl.constexpr, C: tl.constexpr):
    """The norm's weight, once for every token: as a row it would lie with other threads."""
    at = tl.broadcast_to(ptr + channel, (BLOCK_T, channel.shape[1]))
    return tl.load(at, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def _with_column(rows, values, COLUMN: tl.constexpr):
    """rows [BLOCK_T, WIDTH] with the sums over values [BLOCK_T, channels] in one column."""
    column = tl.arange(0, rows.shape[1])[None, :]
    return tl.where(column == COLUMN, tl.sum(values, axis=1, keep_dims=True), rows)


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


@triton.jit
def _add_products(sums, x, values, RUN: tl.constexpr, N: tl.constexpr):
    """sums [BLOCK_T, channels / RUN] of x times each value: neighbours share a thread."""
    new = ()
    for i in tl.static_range(N):
        products = tl.reshape(x * values[i], (x.shape[0], x.shape[1] // RUN, RUN))
        new += (sums[i] + tl.sum(products, axis=2),)
    return new


@triton.jit
def _zeros(BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """N tiles [BLOCK_T, WIDTH] of zeros."""
    values = ()
    for _ in tl.static_range(N):
        values += (tl.zeros((BLOCK_T, WIDTH), tl.float32),)
    return values


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
    post = _token_numbers(post_ptr + token * N, is_token, N)
    comb = _token_numbers(comb_ptr + token * (N * N), is_token, N * N)
    pre = _token_numbers(pre_ptr + token * N, is_token, N)
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


@triton.jit(do_not_specialize=["t"])
def _single_pass_bwd_kernel(
    grad_ptr, passed_ptr, x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, pre_ptr,
    weight_ptr, d_x_ptr, d_y_ptr, d_post_ptr, d_comb_ptr, d_pre_ptr, d_weight_ptr, t, norm_eps,
    N: tl.constexpr, C: tl.constexpr, IS_PASSED: tl.constexpr, INTERPRETED: tl.constexpr,
    IS_KEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # d_weight [programs, C]
    PIECES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    d_weight = _zeros(BLOCK_T, BLOCK_C, PIECES)
    for block in range(tl.program_id(0), tl.cdiv(t, BLOCK_T), tl.num_programs(0)):
        token = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        is_token = token < t
        post = _token_numbers(post_ptr + token * N, is_token, N)
        comb = _token_numbers(comb_ptr + token * (N * N), is_token, N * N)
        pre = _token_numbers(pre_ptr + token * N, is_token, N)
        rows = x_ptr + token * stride_x_t
        values, kept = (), ()
        # sums of the collapse by itself and by the norm's gradient
        norms = _zeros(BLOCK_T, BLOCK_C // RUN, 2)
        # sums of the new streams by the norm's gradient and by their own collapse
        by_grad = _zeros(BLOCK_T, BLOCK_C // RUN, N)
        by_value = _zeros(BLOCK_T, BLOCK_C // RUN, N)
        for piece in tl.static_range(PIECES):
            channel = (piece * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            inside = is_token & (channel < C)
            weight = _norm_weight(weight_ptr, channel, BLOCK_T, C)
            y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0)
            grad = tl.load(grad_ptr + token * C + channel, mask=inside, other=0.0)
            x = tiles(rows, stride_x_n, channel, inside, N)
            if IS_KEPT:
                kept += x
                kept += (y, grad)
            new = _written(_wide(x, N), y.to(tl.float32), post, comb, DTYPE, INTERPRETED, N)
            new = _wide(new, N)
            value = weighted_sum(new, pre, N)
            scaled = grad.to(tl.float32) * weight
            norms = _add_products(norms, value, (value, scaled), RUN, 2)
            by_grad = _add_products(by_grad, scaled, new, RUN, N)
            by_value = _add_products(by_value, value, new, RUN, N)
            values += (value,)
        rstd = tl.rsqrt(tl.sum(norms[0], axis=1, keep_dims=True) / C + norm_eps)
        # where there is no token an eps of 0 gives infinity, which d_weight must not meet
        rstd = tl.where(is_token, rstd, 0.0)
        slope = tl.sum(norms[1], axis=1, keep_dims=True) * rstd * rstd * rstd / C
        # gradients of a token's numbers, [pre | post | comb]: one store for all of a kind
        numbers = tl.zeros((BLOCK_T, WIDTH), tl.float32)
        for k in tl.static_range(N):
            numbers = _with_column(numbers, by_grad[k] * rstd - by_value[k] * slope, k)

        # d_post, then d_comb row by row
        sums = _zeros(BLOCK_T, BLOCK_C // RUN, N + N * N)
        new_d_weight = ()
        for piece in tl.static_range(PIECES):
            channel = (piece * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            inside = is_token & (channel < C)
            weight = _norm_weight(weight_ptr, channel, BLOCK_T, C)
            if IS_KEPT:
                x = kept[piece * (N + 2) : piece * (N + 2) + N]
                y, grad = kept[piece * (N + 2) + N], kept[piece * (N + 2) + N + 1]
            else:
                x = tiles(rows, stride_x_n, channel, inside, N)
                y = tl.load(y_ptr + token * C + channel, mask=inside, other=0.0)
                grad = tl.load(grad_ptr + token * C + channel, mask=inside, other=0.0)
            grad = grad.to(tl.float32) * rstd
            new_d_weight += (d_weight[piece] + grad * values[piece],)
            d_value = grad * weight - values[piece] * slope
            d_new = ()
            for k in tl.static_range(N):
                one = pre[k] * d_value
                if IS_PASSED:
                    at = passed_ptr + (token * N + k) * C + channel
                    one += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                d_new += (one,)
            d_y = round_to(weighted_sum(d_new, post, N), d_y_ptr.dtype.element_ty, INTERPRETED)
            tl.store(d_y_ptr + token * C + channel, d_y, mask=inside)
            new_sums = _add_products(sums[:N], y.to(tl.float32), d_new, RUN, N)
            for j in tl.static_range(N):
                row = sums[N + j * N : 2 * N + j * N]
                new_sums += _add_products(row, x[j].to(tl.float32), d_new, RUN, N)
                d_x = weighted_sum(d_new, comb[j * N : (j + 1) * N], N)
                at = d_x_ptr + (token * N + j) * C + channel
                tl.store(at, round_to(d_x, DTYPE, INTERPRETED), mask=inside)
            sums = new_sums
        d_weight = new_d_weight
        for i in tl.static_range(N + N * N):
            numbers = _with_column(numbers, sums[i], N + i)
        column = tl.arange(0, WIDTH)[None, :]
        is_pre, is_post = column < N, (column >= N) & (column < 2 * N)
        is_comb = (column >= 2 * N) & (column < 2 * N + N * N)
        tl.store(d_pre_ptr + token * N + column, numbers, mask=is_token & is_pre)
        tl.store(d_post_ptr + token * N + column - N, numbers, mask=is_token & is_post)
        at = d_comb_ptr + token * (N * N) + column - 2 * N
        tl.store(at, numbers, mask=is_token & is_comb)
    for piece in tl.static_range(PIECES):
        channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        part = d_weight_ptr + tl.program_id(0) * C + channel
        tl.store(part, tl.sum(d_weight[piece], axis=0), mask=channel < C)


def mhc_write_back_collapse_norm_triton(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float, config: PassConfig = FORWARD,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.mhc.single_pass.mhc_write_back_collapse_norm`."""
    check_kernel_streams(x)
    t, n, c = x.shape
    u = torch.empty(t, c, dtype=x.dtype, device=x.device)
    out = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        constants, options = pass_launch(n, c, x.element_size(), config)
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
    pre: Tensor, weight: Tensor, *, norm_eps: float, config: PassConfig | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the six tensors, from contiguous ones of u and of the new streams."""
    t, n, c = x.shape
    config = config or (BACKWARD if n <= WIDE_STREAMS else MANY_STREAMS)
    d_x, d_y = (torch.empty(z.shape, dtype=z.dtype, device=x.device) for z in (x, y))
    small = [torch.empty(z.shape, dtype=torch.float32, device=x.device) for z in (post, comb, pre)]
    constants, options = pass_launch(n, c, x.element_size(), config, is_backward=True)
    blocks = -(-t // constants["BLOCK_T"])
    num_programs = min(blocks, config.programs_per_sm * num_sms(x.device))
    d_weight = torch.empty(num_programs, c, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        kernel: Any = _single_pass_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(num_programs,)](
                grad, grad if passed is None else passed, x, x.stride(0), x.stride(1),
                y.contiguous(), post.contiguous(), comb.contiguous(), pre.contiguous(),
                weight.contiguous(), d_x, d_y, *small, d_weight, t, norm_eps,
                IS_PASSED=passed is not None, INTERPRETED=knobs.runtime.interpret,
                **constants, **options,
            )  # fmt: skip
    d_post, d_comb, d_pre = (
        d.to(z.dtype) for d, z in zip(small, (post, comb, pre), strict=True)
    )  # fmt: skip
    return d_x, d_y, d_post, d_comb, d_pre, d_weight.sum(0).to(weight.dtype)


def pass_launch(
    n: int, c: int, element_bytes: int, config: PassConfig, *, is_backward: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel whose programs hold whole tokens."""
    run = max(1, config.load_bytes // element_bytes)
    per_warp = 32 * run
    token_warps = min(config.max_warps, triton.next_power_of_2(-(-c // (config.pieces * per_warp))))
    block_t = max(1, config.warps // token_warps)
    constants = {"N": n, "C": c, "BLOCK_T": block_t, "BLOCK_C": token_warps * per_warp}
    if is_backward:
        width = triton.next_power_of_2(n * n + 2 * n)
        is_kept = -(-c // constants["BLOCK_C"]) <= config.kept_pieces
        constants |= {"RUN": run, "IS_KEPT": is_kept, "WIDTH": width}
    return constants, launch_options(block_t * token_warps, 1)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels, and forward of 768: see `BACKWARD`."""
    cases = []
    for c in (768, SHIPPED[1]):
        constants, options = pass_launch(4, c, 2, FORWARD)
        constants["INTERPRETED"] = False
        case = compile_case(f"single pass c={c}", _single_pass_fwd_kernel, constants, **options)
        cases.append(replace(case, signature={**case.signature, "u_ptr": "*bf16"}))
    constants, options = pass_launch(*SHIPPED, 2, BACKWARD, is_backward=True)
    constants |= {"INTERPRETED": False, "IS_PASSED": True}
    name = f"single pass backward c={SHIPPED[1]}"
    return [*cases, compile_case(name, _single_pass_bwd_kernel, constants, **options)]

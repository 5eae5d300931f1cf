"""Triton kernels for two sublayers' seam, backward.

The gradient of the collapse walks over the tokens of its program and adds up that of the norm's
weight. The gradient of the write-back computes the streams that it wrote again instead of reading
them, and adds what comes from the coefficients, a matrix of rank n*n + 2n and a multiple of the
stream, to their gradient on the way: its programs own some channels of every stream and walk over
tokens, so that phi and its gradient stay where they are. Sums over channels leave in parts, which
a last kernel adds up in a fixed order. Nothing is atomic.
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
from model1.ops.launch import device_target, launch_options, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    SHIPPED_WIDTH,
    Config,
    compile_case,
    pinned,
    project_constants,
    register_kind,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_backward import product_gradient, token_splits
from model1.ops.mhc.portable_chain import (
    row_launch,
    tiles,
    token_weights,
    with_near_tokens,
    written,
)
from model1.ops.mhc.portable_streams import numbers, streams, weighted_sum
from model1.ops.rounding import round_to

# None of these is measured yet.
COLLAPSE_PROGRAMS_PER_SM = 2
SHORT = Config(block_t=32, block_c=32, num_warps=4, num_stages=1, programs_per_sm=2)
# more than 4 streams: phi's block and its gradient have up to 128 rows for each
MANY_STREAMS = Config(block_t=16, block_c=16, num_warps=8, num_stages=1, programs_per_sm=1)
# products in fp32 take more registers
FULL_PRECISION = Config(block_t=16, block_c=32, num_warps=4, num_stages=1, programs_per_sm=2)
SUM_TOKENS = 32


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


@triton.jit(do_not_specialize=["t", "splits", "tokens_per_split"])
def _write_back_project_bwd_kernel(
    grad_ptr, x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, phi_ptr, d_product_ptr,
    d_x_ptr, d_y_ptr, d_phi_ptr, d_parts_ptr, t, splits, tokens_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, REGISTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # d_phi [splits, WIDTH, N * C]; d_parts [blocks of channels, N + N * N, t]: of post, then comb
    INTERPRETED: tl.constexpr = REGISTER == ""
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    # fp16 would lose small gradients
    IS_SHORT: tl.constexpr = DTYPE.is_bf16()
    # the interpreter multiplies matrices in fp32 alone
    FACTOR: tl.constexpr = DTYPE if IS_SHORT and not INTERPRETED else tl.float32
    NUM_SUMS: tl.constexpr = N + N * N
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    column = tl.arange(0, BLOCK_W)
    is_phi = (column < WIDTH)[:, None] & (channel < C)
    row = tl.arange(0, BLOCK_T)
    phi, d_phi = (), ()
    for k in tl.static_range(N):
        at = phi_ptr + k * C + (column[:, None] * (N * C) + channel)
        part = tl.load(at, mask=is_phi, other=0.0).to(tl.float32)
        if IS_SHORT:
            part = pinned(round_to(part, DTYPE, INTERPRETED), REGISTER)
        phi += (part.to(FACTOR),)
        d_phi += (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, t), BLOCK_T):
        # 32 bits are enough from a tile's first number to its others
        tile = tl.cast(start, tl.int64)
        is_token = (start + row < t)[:, None]
        is_x = is_token & (channel < C)
        post = token_weights(post_ptr + tile * N, is_token, N, N)
        comb = token_weights(comb_ptr + tile * (N * N), is_token, N * N, N * N)
        product_ptr = d_product_ptr + tile * BLOCK_W + row[:, None] * BLOCK_W
        along = tl.load(product_ptr + WIDTH, mask=is_token, other=0.0)
        is_product = is_token & (column < WIDTH)[None, :]
        high = tl.load(product_ptr + column[None, :], mask=is_product, other=0.0)
        low = high
        if IS_SHORT:
            rounded = round_to(high, DTYPE, INTERPRETED)
            low = pinned(round_to(high - rounded.to(tl.float32), DTYPE, INTERPRETED), REGISTER).to(
                FACTOR
            )
            high = pinned(rounded, REGISTER).to(FACTOR)
        y = tl.load(y_ptr + tile * C + (row[:, None] * C + channel), mask=is_x, other=0.0)
        offset = row[:, None] * stride_x_t + channel
        x = tiles(x_ptr + tile * stride_x_t, stride_x_n, offset, is_x, N)
        offset = row[:, None] * (N * C) + channel
        d_y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        d_x, new = (), ()
        for _ in tl.static_range(N):
            d_x += (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
        sums_ptr = d_parts_ptr + block.to(tl.int64) * NUM_SUMS * t + tile + row
        for k in tl.static_range(N):
            out = round_to(written(x, y, post, comb, k, N), DTYPE, INTERPRETED)
            grad = tl.load(grad_ptr + tile * (N * C) + k * C + offset, mask=is_x, other=0.0)
            total = tl.fma(out.to(tl.float32), along.broadcast_to(out.shape), grad.to(tl.float32))
            factor = pinned(out, REGISTER).to(FACTOR)
            if IS_SHORT:
                # two roundings on the way, as the result's own
                total += tl.dot(high, phi[k])
                part = tl.dot(tl.trans(low), factor, acc=d_phi[k])
                new += (tl.dot(tl.trans(high), factor, acc=part),)
            else:
                total += tl.dot(high, phi[k], input_precision="ieee")
                new += (tl.dot(tl.trans(high), factor, acc=d_phi[k], input_precision="ieee"),)
            d_y = tl.fma(total, post[k].broadcast_to(total.shape), d_y)
            value = tl.sum(total * y.to(tl.float32), axis=1)
            tl.store(sums_ptr + k * t.to(tl.int64), value, mask=start + row < t)
            d_old = d_x
            d_x = ()
            for j in tl.static_range(N):
                weight = comb[j * N + k].broadcast_to(total.shape)
                d_x += (tl.fma(total, weight, d_old[j]),)
                value = tl.sum(total * x[j].to(tl.float32), axis=1)
                at = sums_ptr + (N + j * N + k) * t.to(tl.int64)
                tl.store(at, value, mask=start + row < t)
        d_phi = new
        d_y = round_to(d_y, d_y_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_y_ptr + tile * C + (row[:, None] * C + channel), d_y, mask=is_x)
        for j in tl.static_range(N):
            at = d_x_ptr + tile * (N * C) + j * C + offset
            tl.store(at, round_to(d_x[j], DTYPE, INTERPRETED), mask=is_x)
    for k in tl.static_range(N):
        part = d_phi_ptr + split.to(tl.int64) * (WIDTH * N * C) + k * C
        tl.store(part + (column[:, None] * (N * C) + channel), d_phi[k], mask=is_phi)


@triton.jit(do_not_specialize=["t", "blocks"])
def _sum_parts_kernel(
    d_parts_ptr, d_post_ptr, d_comb_ptr, t, blocks, N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # a program adds up one column of a tile of tokens
    NUM_SUMS: tl.constexpr = N + N * N
    column = tl.program_id(0) % NUM_SUMS
    token = (tl.program_id(0) // NUM_SUMS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T,), tl.float32)
    at = d_parts_ptr + column * t.to(tl.int64) + token
    for _ in range(blocks):
        total += tl.load(at, mask=token < t, other=0.0)
        at += NUM_SUMS * t.to(tl.int64)
    is_post = column < N
    tl.store(d_post_ptr + token * N + column, total, mask=(token < t) & is_post)
    tl.store(d_comb_ptr + token * (N * N) + column - N, total, mask=(token < t) & (not is_post))


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
        constants, options = row_launch(n, c)
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
    saved: Tensor, *, iters: int, eps: float, norm_eps: float, config: Config | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of `mhc_write_back_coefficients_backward_ref`, from contiguous gradients."""
    grads = d_pre, d_post, d_comb
    d_product, d_scale, d_bias = product_gradient(
        grads, x.shape, scale, bias, saved, iters=iters, eps=eps
    )
    d_x, d_y, d_old_post, d_old_comb, d_phi = _through_write_back(
        d_out, x, y, post, comb, phi, d_product, config or choose_config(x.shape[1], x.dtype)
    )
    return d_x, d_y, d_old_post, d_old_comb, d_phi, d_scale, d_bias


def _through_write_back(
    d_out: Tensor, x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor,
    d_product: Tensor, config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (t, n, c), device = x.shape, x.device
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=device)
    d_y = torch.empty(t, c, dtype=y.dtype, device=device)
    d_post = torch.empty(t, n, dtype=torch.float32, device=device)
    d_comb = torch.empty(t, n, n, dtype=torch.float32, device=device)
    blocks = -(-c // config.block_c)
    splits, tokens_per_split = token_splits(t, blocks, config, num_sms(device))
    d_phi = torch.empty(splits, *phi.shape, dtype=torch.float32, device=device)
    if t > 0:
        x = with_near_tokens(x, config.block_t)
        d_parts = torch.empty(blocks, n + n * n, t, dtype=torch.float32, device=device)
        kernel: Any = _write_back_project_bwd_kernel
        add_up: Any = _sum_parts_kernel
        with torch.cuda.device_of(x):
            kernel[(blocks * splits,)](
                d_out, x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(),
                comb.contiguous(), phi.contiguous(), d_product, d_x, d_y, d_phi, d_parts,
                t, splits, tokens_per_split, REGISTER=register_kind(device_target(device)),
                **project_constants(n, c, phi.shape[0], config),
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
            add_up[(-(-t // SUM_TOKENS) * (n + n * n),)](
                d_parts, d_post, d_comb, t, blocks, N=n, BLOCK_T=SUM_TOKENS,
                **launch_options(1, 1),
            )  # fmt: skip
    d_phi = d_phi.sum(0).to(phi.dtype)
    return d_x, d_y, d_post.to(post.dtype), d_comb.to(comb.dtype), d_phi


def choose_config(n: int, dtype: torch.dtype) -> Config:
    """What `_write_back_project_bwd_kernel` is launched with."""
    if n > 4:
        return MANY_STREAMS
    return SHORT if dtype == torch.bfloat16 else FULL_PRECISION


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gradients of four streams of 4096 channels."""
    rows, row_options = row_launch(*SHIPPED)
    constants = project_constants(*SHIPPED, SHIPPED_WIDTH, SHORT)
    constants["REGISTER"] = register_kind(target)
    options = SHORT.num_warps, SHORT.num_stages
    name, kernel = "write back and project backward", _write_back_project_bwd_kernel
    sums = {"N": SHIPPED[0], "BLOCK_T": SUM_TOKENS}
    return [
        compile_case(
            "collapse and norm backward", _collapse_norm_bwd_kernel, rows | {"IS_PASSED": True},
            **row_options,
        ),
        compile_case(name, kernel, constants, *options),
        compile_case("sum of parts", _sum_parts_kernel, sums, 1),
    ]  # fmt: skip

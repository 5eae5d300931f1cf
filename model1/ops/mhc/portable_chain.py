"""Triton kernels for two sublayers' seam, forward: what `model1.ops.mhc.chain` says in one pass.

`_collapse_norm_fwd_kernel` holds all channels of a token's collapse, whose root mean square it
needs. `_write_back_project_fwd_kernel` mixes a tile of tokens, and multiplies what it stores by the
next sublayer's phi while it is in registers: phi is read once a tile, from the L2 cache, the
streams once in all. Where tiles are few, programs share out the channels and leave parts, as the
unfused projection does; its second kernel adds them up and does the rounds.
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
from model1.ops.launch import device_target, launch_options, num_sms
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable import (
    SHIPPED,
    SHIPPED_WIDTH,
    Config,
    add_products,
    choose_splits,
    compile_case,
    finish,
    project_constants,
    register_kind,
    store_part,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_streams import numbers, streams, weighted_sum
from model1.ops.rounding import round_to

# Of one thread of a program that holds a whole token, as far as MAX_WARPS allows. Not measured yet.
CHANNELS_PER_THREAD = 16
MAX_WARPS = 16

# How write-back and projection are cut. None of them is measured yet.
MANY_TOKENS = Config(block_t=64, block_c=32, num_warps=8, num_stages=1, programs_per_sm=2)
SOME_TOKENS = Config(block_t=32, block_c=32, num_warps=4, num_stages=1, programs_per_sm=3)
FEW_TOKENS = Config(block_t=16, block_c=64, num_warps=4, num_stages=1, programs_per_sm=3)
# more than 4 streams: a token has up to 72 weights, and phi's block 128 rows
MANY_STREAMS = Config(block_t=32, block_c=32, num_warps=8, num_stages=1, programs_per_sm=1)
# products in fp32 take more registers
FULL_PRECISION = Config(block_t=32, block_c=32, num_warps=4, num_stages=1, programs_per_sm=2)


def choose_config(t: int, n: int, dtype: torch.dtype) -> Config:
    """What `_write_back_project_fwd_kernel` is launched with."""
    if n > 4:
        return MANY_STREAMS
    if dtype == torch.float32:
        return FULL_PRECISION
    if t <= 64:
        return FEW_TOKENS
    return SOME_TOKENS if t <= 1024 else MANY_TOKENS


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


@triton.jit
def token_weights(ptr, is_token, STEP: tl.constexpr, N: tl.constexpr):
    """N numbers of each token, STEP from one to the next, [BLOCK_T, 1] fp32; 0 for no token."""
    at = ptr + tl.arange(0, is_token.shape[0])[:, None] * STEP
    values = ()
    for i in tl.static_range(N):
        values += (tl.load(at + i, mask=is_token, other=0.0).to(tl.float32),)
    return values


@triton.jit
def written(x, y, post, comb, K: tl.constexpr, N: tl.constexpr):
    """Stream K after the write-back, fp32: post_K y + sum_j comb[j, K] x_j; tiles of any dtype."""
    out = x[0].to(tl.float32) * comb[K]
    for j in tl.static_range(1, N):
        out = tl.fma(x[j].to(tl.float32), comb[j * N + K].broadcast_to(out.shape), out)
    return tl.fma(y.to(tl.float32), post[K].broadcast_to(out.shape), out)


@triton.jit
def tiles(ptr, stride, offset, mask, N: tl.constexpr):
    """The same channels of every stream, in their own dtype."""
    values = ()
    for _ in tl.static_range(N):
        values += (tl.load(ptr + offset, mask=mask, other=0.0),)
        ptr += stride  # a multiple of it may not fit 32 bits
    return values


@triton.jit(do_not_specialize=["t", "splits", "blocks_per_split"])
def _write_back_project_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, phi_ptr, out_ptr, parts_ptr,
    t, splits, blocks_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, REGISTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # parts [splits, t, BLOCK_W]: the products, then the sum of squares
    INTERPRETED: tl.constexpr = REGISTER == ""
    split = tl.program_id(0) % splits
    tile = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    is_token = (tile + row < t)[:, None]
    column = tl.arange(0, BLOCK_W)[:, None]
    # 32 bits are enough from a tile's first number to its others
    x_ptr += tile * stride_x_t
    y_ptr += tile * C
    out_ptr += tile * (N * C)
    post = token_weights(post_ptr + tile * N, is_token, N, N)
    comb = token_weights(comb_ptr + tile * (N * N), is_token, N * N, N * N)
    products = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, (C + BLOCK_C - 1) // BLOCK_C)
    for block in range(first, last):
        channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        is_x, is_phi = is_token, column < WIDTH
        if C % BLOCK_C != 0:
            is_x &= channel < C
            is_phi &= channel < C
        y = tl.load(y_ptr + row[:, None] * C + channel, mask=is_x, other=0.0)
        x = tiles(x_ptr, stride_x_n, row[:, None] * stride_x_t + channel, is_x, N)
        for k in tl.static_range(N):
            out = written(x, y, post, comb, k, N)
            out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
            tl.store(out_ptr + k * C + (row[:, None] * (N * C) + channel), out, mask=is_x)
            # statistics are of the streams as they are stored
            wide = out.to(tl.float32)
            squares += wide * wide
            phi = tl.load(phi_ptr + k * C + (column * (N * C) + channel), mask=is_phi, other=0.0)
            products = add_products(products, out, phi.to(tl.float32), INTERPRETED, REGISTER)
    part = split.to(tl.int64) * t + tile + row
    store_part(parts_ptr, part, products, squares, is_token, WIDTH)


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


def mhc_write_back_coefficients_triton(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *,
    iters: int, eps: float, norm_eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The new streams, then what `mhc_coefficients_triton` returns for them."""
    check_kernel_streams(x)
    t, n, c = x.shape
    out = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    config = config or choose_config(t, n, x.dtype)
    constants = project_constants(n, c, phi.shape[0], config)
    blocks = -(-c // config.block_c)
    splits, blocks_per_split = choose_splits(t, blocks, config, num_sms(x.device))
    parts = torch.empty(splits, t, constants["BLOCK_W"], dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_near_tokens(x, config.block_t)
        kernel: Any = _write_back_project_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-t // config.block_t) * splits,)](
                x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(), comb.contiguous(),
                phi.contiguous(), out, parts, t, splits, blocks_per_split,
                REGISTER=register_kind(device_target(x.device)), **constants,
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    return out, *finish(parts, out.shape, scale, bias, **options)


def with_near_tokens(x: Tensor, block_t: int) -> Tensor:
    """x itself if 32 bits reach from a tile's first number of a stream to its last, else a copy."""
    x = with_adjacent_channels(x)
    return x if block_t * x.stride(0) + x.shape[2] < 2**31 else x.contiguous()


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
    cases = [compile_case("collapse and norm", _collapse_norm_fwd_kernel, constants, **options)]
    for name, config in (
        ("many tokens", MANY_TOKENS),
        ("some tokens", SOME_TOKENS),
        ("few tokens", FEW_TOKENS),
    ):
        constants = project_constants(*SHIPPED, SHIPPED_WIDTH, config)
        constants["REGISTER"] = register_kind(target)
        kernel, options = _write_back_project_fwd_kernel, (config.num_warps, config.num_stages)
        cases.append(compile_case(f"write back and project {name}", kernel, constants, *options))
    return cases

"""Triton kernels for the gradient of the hyper-connection coefficients.

The first goes from the coefficients back to the products of phi and the streams: it repeats the
Sinkhorn rounds of its tokens, with their divisors into a workspace, and walks back through them.
The second reads the streams once for both their own gradient and that of phi. Sums over tokens are
written in parts and added up in a fixed order.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportAttributeAccessIssue=none

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    SHIPPED_WIDTH,
    Config,
    block_width,
    compile_case,
    project_constants,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_rounds_backward import (
    affine_entries,
    divided_round,
    divided_round_bwd,
    row_softmaxes,
    row_softmaxes_bwd,
    token_columns,
)
from model1.ops.rounding import round_to

TOKENS = 32  # of one warp, whose threads hold a token's matrix each
SHORT = Config(block_t=32, block_c=64, num_warps=4, num_stages=3, programs_per_sm=4)
# products in fp32 take more registers
FULL_PRECISION = Config(block_t=32, block_c=32, num_warps=4, num_stages=2, programs_per_sm=4)


@triton.jit
def _group_bwd(
    grad, z, factor_ptr, sums_ptr, FIRST: tl.constexpr, NUM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """From gradients of NUM logits to those of z, and the sum of both; stores sums over tokens."""
    along = tl.zeros_like(grad[0])
    new = ()
    for i in tl.static_range(NUM):
        tl.store(sums_ptr + FIRST + i, tl.sum(grad[i] * z[i], axis=0))
        tl.store(sums_ptr + WIDTH + FIRST + i, tl.sum(grad[i], axis=0))
        scaled = grad[i] * tl.load(factor_ptr + FIRST + i).to(tl.float32)
        along = tl.fma(scaled, z[i], along)
        new += (scaled,)
    return new, along


@triton.jit(do_not_specialize=["t", "iters"])
def _coefficients_bwd_kernel(
    d_pre_ptr, d_post_ptr, d_comb_ptr, saved_ptr, scale_ptr, bias_ptr,
    totals_ptr, d_product_ptr, short_ptr, spread_ptr, sums_ptr, t, iters, eps,
    N: tl.constexpr, C: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # totals [2 iters - 1, N, tokens]: what each normalisation divides by, which leads back from its
    # result to what it took. d_product [t, BLOCK_W]: of phi x; short [WIDTH, t]: that rounded;
    # spread [t]: what x itself is multiplied by. sums [programs, 2, WIDTH]: for scale, for bias.
    WIDTH: tl.constexpr = N * N + 2 * N
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    is_token = token < t
    saved = saved_ptr + token * (WIDTH + 1)
    rstd = tl.load(saved + WIDTH, mask=is_token, other=0.0)
    z = token_columns(saved, is_token, 0, WIDTH)
    softmax = row_softmaxes(affine_entries(z, scale_ptr, bias_ptr, 2 * N, N * N), N)
    comb = ()
    for i in tl.static_range(N * N):
        comb += (softmax[i] + eps,)
    # only the thread that wrote a total reads it
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_T
    totals = totals_ptr + token
    comb = divided_round(comb, totals, stride, eps, True, N)
    for _ in range(iters - 1):
        totals += N * stride
        comb = divided_round(comb, totals, stride, eps, False, N)
        totals += N * stride
        comb = divided_round(comb, totals, stride, eps, True, N)
    tl.debug_barrier()
    grad = token_columns(d_comb_ptr + token * (N * N), is_token, 0, N * N)
    for _ in range(iters - 1):
        grad, comb = divided_round_bwd(grad, comb, totals, stride, True, N)
        totals -= N * stride
        grad, comb = divided_round_bwd(grad, comb, totals, stride, False, N)
        totals -= N * stride
    grad, comb = divided_round_bwd(grad, comb, totals, stride, True, N)
    grad = row_softmaxes_bwd(grad, softmax, N)

    sums = sums_ptr + tl.program_id(0) * (2 * WIDTH)
    grad, along = _group_bwd(grad, z[2 * N :], scale_ptr, sums, 2 * N, N * N, WIDTH)
    store_product(
        grad, rstd, token, is_token, d_product_ptr, short_ptr, t, 2 * N, N * N, BLOCK_W, INTERPRETED
    )  # fmt: skip
    for is_post in tl.static_range(2):
        d_ptr = d_post_ptr if is_post else d_pre_ptr
        logits = affine_entries(z, scale_ptr, bias_ptr, is_post * N, N)
        given = token_columns(d_ptr + token * N, is_token, 0, N)
        d_logits = ()
        for i in tl.static_range(N):
            weight = tl.sigmoid(logits[i])
            d_logits += (given[i] * ((1 + is_post) * weight * (1.0 - weight)),)
        of_z = z[is_post * N : is_post * N + N]
        d_logits, more = _group_bwd(d_logits, of_z, scale_ptr, sums, is_post * N, N, WIDTH)
        along += more
        store_product(
            d_logits, rstd, token, is_token, d_product_ptr, short_ptr, t,
            is_post * N, N, BLOCK_W, INTERPRETED,
        )  # fmt: skip
    spread = -along * rstd * rstd / (N * C)
    tl.store(spread_ptr + token, spread, mask=is_token)


@triton.jit
def store_product(
    grad, rstd, token, is_token, d_product_ptr, short_ptr, t,
    FIRST: tl.constexpr, NUM: tl.constexpr, BLOCK_W: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gradients of NUM columns of phi x, as they are and rounded."""
    for i in tl.static_range(NUM):
        value = grad[i] * rstd
        tl.store(d_product_ptr + token * BLOCK_W + FIRST + i, value, mask=is_token)
        short = round_to(value, short_ptr.dtype.element_ty, INTERPRETED)
        tl.store(short_ptr + (FIRST + i) * t.to(tl.int64) + token, short, mask=is_token)


@triton.jit(do_not_specialize=["t", "splits", "tokens_per_split"])
def _project_bwd_kernel(
    x_ptr, stride_x_t, stride_x_n, phi_ptr, d_product_ptr, spread_ptr, passed_ptr, d_x_ptr,
    d_phi_ptr,
    t, splits, tokens_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    IS_PASSED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # d_phi [splits, WIDTH, N * C]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # fp16 would lose small gradients
    IS_SHORT: tl.constexpr = DTYPE.is_bf16()
    # the interpreter multiplies matrices in fp32 alone
    FACTOR: tl.constexpr = DTYPE if IS_SHORT and not INTERPRETED else tl.float32
    STREAM_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    stream = block // STREAM_BLOCKS
    channel = (block % STREAM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    is_channel = channel < C
    column = tl.arange(0, BLOCK_W)
    at = column[:, None] * (N * C) + stream * C + channel
    is_phi = (column < WIDTH)[:, None] & is_channel
    phi = tl.load(phi_ptr + at, mask=is_phi, other=0.0).to(tl.float32)
    if IS_SHORT:
        short_phi = round_to(phi, DTYPE, INTERPRETED)
        rest = round_to(phi - short_phi.to(tl.float32), DTYPE, INTERPRETED).to(FACTOR)
        phi = short_phi.to(FACTOR)
    d_phi = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, t), BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = token < t
        is_x = is_token[:, None] & is_channel
        rows = x_ptr + token[:, None] * stride_x_t + stream.to(tl.int64) * stride_x_n
        x = tl.load(rows + channel, mask=is_x, other=0.0)
        product = d_product_ptr + token * BLOCK_W
        is_product = is_token[:, None] & (column < WIDTH)[None, :]
        grad = tl.load(product[:, None] + column[None, :], mask=is_product, other=0.0)
        d_x = x.to(tl.float32) * tl.load(spread_ptr + token, mask=is_token, other=0.0)[:, None]
        at_x = (token[:, None] * N + stream) * C + channel
        if IS_PASSED:
            d_x += tl.load(passed_ptr + at_x, mask=is_x, other=0.0).to(tl.float32)
        factor = x.to(FACTOR)
        if IS_SHORT:
            rounded = round_to(grad, DTYPE, INTERPRETED)
            low = round_to(grad - rounded.to(tl.float32), DTYPE, INTERPRETED).to(FACTOR)
            high = rounded.to(FACTOR)
            d_phi = tl.dot(tl.trans(low), factor, acc=d_phi)
            d_phi = tl.dot(tl.trans(high), factor, acc=d_phi)
            # two roundings on the way, as the result's own, which average out over many columns
            d_x = tl.dot(high, phi, acc=d_x)
            if WIDTH == N:
                d_x = tl.dot(low, phi, acc=d_x)
                d_x = tl.dot(high, rest, acc=d_x)
        else:
            d_phi = tl.dot(tl.trans(grad), factor, acc=d_phi, input_precision="ieee")
            d_x = tl.dot(grad, phi, acc=d_x, input_precision="ieee")
        tl.store(d_x_ptr + at_x, round_to(d_x, DTYPE, INTERPRETED), mask=is_x)
    part = d_phi_ptr + split.to(tl.int64) * (WIDTH * N * C)
    tl.store(part + at, d_phi, mask=is_phi)


def mhc_coefficients_backward_triton(
    d_pre: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, saved: Tensor, *,
    iters: int, eps: float, norm_eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, phi, scale and bias; see `mhc_coefficients_backward_ref`."""
    grads = d_pre, d_post, d_comb
    product = product_gradient(grads, x, scale, bias, saved, iters=iters, eps=eps)
    d_x, d_phi = stream_gradient(x, phi, product.full, product.spread, config)
    return d_x, d_phi, product.d_scale, product.d_bias


class ProductGradient(NamedTuple):
    """Gradient of the products of phi and the streams, and those of scale and bias."""

    full: Tensor  # [t, BLOCK_W] fp32, of which n*n + 2n columns are written
    short: Tensor  # [t, n*n + 2n] in the dtype of x, tokens adjacent
    spread: Tensor  # [t] fp32, what x itself is multiplied by for its root mean square
    d_scale: Tensor
    d_bias: Tensor


def product_gradient(
    grads: tuple[Tensor, Tensor, Tensor], x: Tensor, scale: Tensor, bias: Tensor,
    saved: Tensor, *, iters: int, eps: float,
) -> ProductGradient:  # fmt: skip
    """From gradients of pre, post and comb to those of the products, scale and bias."""
    (t, n, c), width, device = x.shape, len(scale), saved.device
    num_programs = -(-t // TOKENS)
    block_w = block_width(width)
    full = torch.empty(t, block_w, dtype=torch.float32, device=device)
    spread = torch.empty(t, dtype=torch.float32, device=device)
    short = torch.empty(width, t, dtype=x.dtype, device=device)
    sums = torch.empty(num_programs, 2, width, dtype=torch.float32, device=device)
    if t > 0:
        size = num_programs * TOKENS * n * (2 * iters - 1)
        totals = torch.empty(size, dtype=torch.float32, device=device)
        kernel: Any = _coefficients_bwd_kernel
        with torch.cuda.device_of(saved):
            kernel[(num_programs,)](
                *grads, saved, scale.contiguous(), bias.contiguous(), totals, full, short, spread,
                sums, t, iters, eps, N=n, C=c, INTERPRETED=knobs.runtime.interpret, BLOCK_T=TOKENS,
                BLOCK_W=block_w, **launch_options(1, 1),
            )  # fmt: skip
    d_scale, d_bias = (sums[:, i].sum(0) for i in range(2))
    return ProductGradient(full, short.mT, spread, d_scale.to(scale.dtype), d_bias.to(bias.dtype))


def stream_gradient(
    x: Tensor,
    phi: Tensor,
    d_product: Tensor,
    spread: Tensor,
    config: Config | None = None,
    passed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and phi from those of their products; see `ProductGradient`.

    passed: a contiguous gradient of x from elsewhere, added to the first.
    """
    t, n, c = x.shape
    d_x = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    config = config or (SHORT if x.dtype == torch.bfloat16 else FULL_PRECISION)
    blocks = n * -(-c // config.block_c)
    splits, tokens_per_split = token_splits(t, blocks, config, num_sms(x.device))
    d_phi = torch.empty(splits, *phi.shape, dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        kernel: Any = _project_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(blocks * splits,)](
                x, x.stride(0), x.stride(1), phi.contiguous(), d_product, spread,
                d_x if passed is None else passed, d_x, d_phi, t, splits, tokens_per_split,
                IS_PASSED=passed is not None, INTERPRETED=knobs.runtime.interpret,
                **project_constants(n, c, phi.shape[0], config),
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
    return d_x, d_phi.sum(0).to(phi.dtype)


def token_splits(t: int, blocks: int, config: Config, sms: int) -> tuple[int, int]:
    """Parts that the tokens are cut into, and tokens in each; no part is empty."""
    tiles = -(-t // config.block_t)
    tiles_per_split = max(1, tiles // max(1, -(-config.programs_per_sm * sms // blocks)))
    return -(-tiles // tiles_per_split), tiles_per_split * config.block_t


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Gradients of four streams of 4096 channels."""
    n, c = SHIPPED
    config, block_w = SHORT, block_width(SHIPPED_WIDTH)
    first = {"N": n, "C": c, "INTERPRETED": False, "BLOCK_T": TOKENS, "BLOCK_W": block_w}
    second = project_constants(*SHIPPED, SHIPPED_WIDTH, config)
    cases = [compile_case("coefficients backward", _coefficients_bwd_kernel, first, 1)]
    for name, is_passed in (("project backward", False), ("project backward and add", True)):
        constants, options = (
            second | {"IS_PASSED": is_passed},
            (config.num_warps, config.num_stages),
        )
        cases.append(compile_case(name, _project_bwd_kernel, constants, *options))
    return cases

"""Triton kernels for the gradient of the hyper-connection coefficients.

The first goes from the coefficients back to the products of phi and the streams: it repeats the
Sinkhorn rounds of its tokens into a workspace and walks back through them. The second reads the
streams once for both their own gradient and that of phi. Sums over tokens are written in parts and
added up in a fixed order.
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
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    SHIPPED_WIDTH,
    Config,
    affine,
    compile_case,
    matrix_constants,
    project_constants,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_rounds import (
    matrix_columns,
    normalised,
    normalised_bwd,
    row_softmax,
    vector_columns,
)
from model1.ops.rounding import round_to

SHORT = Config(block_t=32, block_c=64, num_warps=4, num_stages=3, programs_per_sm=4)
# products in fp32 take more registers
FULL_PRECISION = Config(block_t=32, block_c=32, num_warps=4, num_stages=2, programs_per_sm=4)


@triton.jit(do_not_specialize=["t", "iters"])
def _coefficients_bwd_kernel(
    d_pre_ptr, d_post_ptr, d_comb_ptr, saved_ptr, scale_ptr, bias_ptr,
    rounds_ptr, d_product_ptr, d_scale_ptr, d_bias_ptr, t, iters, eps,
    N: tl.constexpr, C: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # rounds [t, 2 iters - 1, N, N]: comb before each normalisation. d_product [t, BLOCK_W]: of
    # phi x, then what x itself is multiplied by. d_scale, d_bias: [programs, WIDTH].
    WIDTH: tl.constexpr = N * N + 2 * N
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j, is_j = vector_columns(N, SIZE)
    entry, is_entry = matrix_columns(N, SIZE)
    is_token = token < t
    is_vector = is_token[:, None] & is_j
    is_matrix = is_token[:, None, None] & is_entry

    saved = saved_ptr + token * (WIDTH + 1)
    rstd = tl.load(saved + WIDTH, mask=is_token, other=0.0)
    z = tl.load(saved[:, None, None] + 2 * N + entry, mask=is_matrix, other=0.0)
    comb = affine(z, scale_ptr + 2 * N, bias_ptr + 2 * N, entry, is_entry)
    softmax = row_softmax(comb, is_entry, N)
    comb = tl.where(is_entry, softmax + eps, 0.0)
    rounds = rounds_ptr + token[:, None, None] * ((2 * iters - 1) * N * N) + entry
    tl.store(rounds, comb, mask=is_matrix)
    comb = normalised(comb, is_entry, eps, 1)
    for _ in range(iters - 1):
        rounds += N * N
        tl.store(rounds, comb, mask=is_matrix)
        comb = normalised(comb, is_entry, eps, 2)
        rounds += N * N
        tl.store(rounds, comb, mask=is_matrix)
        comb = normalised(comb, is_entry, eps, 1)
    # what one thread wrote another may read
    tl.debug_barrier()
    grad = tl.load(
        d_comb_ptr + token[:, None, None] * (N * N) + entry, mask=is_matrix, other=0.0
    )  # fmt: skip
    for _ in range(iters - 1):
        before = tl.load(rounds, mask=is_matrix, other=0.0)
        grad = normalised_bwd(grad, comb, before, is_entry, eps, 1)
        rounds -= N * N
        comb = tl.load(rounds, mask=is_matrix, other=0.0)
        grad = normalised_bwd(grad, before, comb, is_entry, eps, 2)
        rounds -= N * N
    before = tl.load(rounds, mask=is_matrix, other=0.0)
    grad = normalised_bwd(grad, comb, before, is_entry, eps, 1)
    grad = softmax * (grad - tl.sum(grad * softmax, axis=2, keep_dims=True))
    # where there is no token an eps of 0 gives NaN, which the sums over tokens must not meet
    grad = tl.where(is_matrix, grad, 0.0)

    at = tl.program_id(0) * WIDTH + 2 * N + entry
    tl.store(d_bias_ptr + at, tl.sum(grad, axis=0)[None], mask=is_entry)
    tl.store(d_scale_ptr + at, tl.sum(grad * z, axis=0)[None], mask=is_entry)
    scale = tl.load(scale_ptr + 2 * N + entry, mask=is_entry, other=0.0).to(tl.float32)
    grad *= scale
    along = tl.sum(tl.sum(grad * z, axis=2), axis=1)
    product = d_product_ptr + token * BLOCK_W
    value = grad * rstd[:, None, None]
    tl.store(product[:, None, None] + 2 * N + entry, value, mask=is_matrix)
    for is_post in tl.static_range(2):
        d_ptr = d_post_ptr if is_post else d_pre_ptr
        first = is_post * N
        z = tl.load(saved[:, None] + first + j, mask=is_vector, other=0.0)
        weight = tl.sigmoid(affine(z, scale_ptr + first, bias_ptr + first, j, is_j))
        grad = tl.load(d_ptr + token[:, None] * N + j, mask=is_vector, other=0.0)
        grad *= (1 + is_post) * weight * (1.0 - weight)
        at = tl.program_id(0) * WIDTH + first + j
        tl.store(d_bias_ptr + at, tl.sum(grad, axis=0)[None], mask=is_j)
        tl.store(d_scale_ptr + at, tl.sum(grad * z, axis=0)[None], mask=is_j)
        grad *= tl.load(scale_ptr + first + j, mask=is_j, other=0.0).to(tl.float32)
        along += tl.sum(grad * z, axis=1)
        tl.store(product[:, None] + first + j, grad * rstd[:, None], mask=is_vector)
    tl.store(product + WIDTH, -along * rstd * rstd / (N * C), mask=is_token)


@triton.jit(do_not_specialize=["t", "splits", "tokens_per_split"])
def _project_bwd_kernel(
    x_ptr, stride_x_t, stride_x_n, phi_ptr, d_product_ptr, passed_ptr, d_x_ptr, d_phi_ptr,
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
        phi = round_to(phi, DTYPE, INTERPRETED).to(FACTOR)
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
        d_x = x.to(tl.float32) * tl.load(product + WIDTH, mask=is_token, other=0.0)[:, None]
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
            # two roundings on the way, as the result's own
            d_x = tl.dot(high, phi, acc=d_x)
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
    d_product, d_scale, d_bias = product_gradient(
        grads, x.shape, scale, bias, saved, iters=iters, eps=eps
    )
    d_x, d_phi = stream_gradient(x, phi, d_product, config)
    return d_x, d_phi, d_scale, d_bias


def product_gradient(
    grads: tuple[Tensor, Tensor, Tensor], shape: torch.Size, scale: Tensor, bias: Tensor,
    saved: Tensor, *, iters: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From gradients of pre, post and comb to those of the products, scale and bias.

    The first, [t, BLOCK_W] fp32: of phi flat(x), and in column n*n + 2n the factor of x itself that
    comes of its root mean square.
    """
    (t, n, c), width, device = shape, len(scale), saved.device
    constants = matrix_constants(n, c)
    num_programs = -(-t // constants["BLOCK_T"])
    d_product = torch.empty(t, constants["BLOCK_W"], dtype=torch.float32, device=device)
    d_scale, d_bias = (
        torch.empty(num_programs, width, dtype=torch.float32, device=device) for _ in range(2)
    )
    if t > 0:
        rounds = torch.empty(t, 2 * iters - 1, n, n, dtype=torch.float32, device=device)
        kernel: Any = _coefficients_bwd_kernel
        with torch.cuda.device_of(saved):
            kernel[(num_programs,)](
                *grads, saved, scale.contiguous(), bias.contiguous(),
                rounds, d_product, d_scale, d_bias, t, iters, eps,
                **constants, **launch_options(1, 1),
            )  # fmt: skip
    return d_product, d_scale.sum(0).to(scale.dtype), d_bias.sum(0).to(bias.dtype)


def stream_gradient(
    x: Tensor,
    phi: Tensor,
    d_product: Tensor,
    config: Config | None = None,
    passed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and phi from that of their products; see `product_gradient`.

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
                x, x.stride(0), x.stride(1), phi.contiguous(), d_product,
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
    config, first = SHORT, matrix_constants(*SHIPPED)
    second = project_constants(*SHIPPED, SHIPPED_WIDTH, config)
    cases = [compile_case("coefficients backward", _coefficients_bwd_kernel, first, 1)]
    for name, is_passed in (("project backward", False), ("project backward and add", True)):
        constants, options = (
            second | {"IS_PASSED": is_passed},
            (config.num_warps, config.num_stages),
        )
        cases.append(compile_case(name, _project_bwd_kernel, constants, *options))
    return cases

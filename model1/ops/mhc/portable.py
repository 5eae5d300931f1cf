"""Triton kernels for the hyper-connection coefficients, forward.

The first kernel reads the streams once. A program multiplies a tile of tokens by a part of phi's
columns and adds up the squares of what it read; its sums go to a workspace. The second kernel adds
the parts of a token in a fixed order and does everything else in registers. Nothing is atomic: the
bits of a token depend on its own values, on the number of tokens, which decides how the columns are
split, and on the strides, which decide how wide loads are.
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
from model1.ops.launch import launch_options, num_sms
from model1.ops.mhc.checks import check_kernel_streams
from model1.ops.mhc.portable_rounds import (
    matrix_columns,
    normalised,
    row_softmax,
    vector_columns,
)
from model1.ops.rounding import round_to

# parts of a token that are added up: few enough to be loaded at once
MAX_SPLITS = 16
MATRIX_ENTRIES = 256  # per program of one warp, over as many tokens as that gives


@dataclass(frozen=True)
class Config:
    """How the projection is cut. Measured with many tokens alone, and not against others."""

    block_t: int
    block_c: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that run at once


MANY_TOKENS = Config(block_t=128, block_c=64, num_warps=8, num_stages=3, programs_per_sm=2)
SOME_TOKENS = Config(block_t=64, block_c=64, num_warps=4, num_stages=3, programs_per_sm=2)
FEW_TOKENS = Config(block_t=16, block_c=128, num_warps=4, num_stages=3, programs_per_sm=4)
# more than 4 streams: phi's block has 64 or 128 rows, which have to fit 64 KB of shared memory
MANY_STREAMS = Config(block_t=64, block_c=32, num_warps=4, num_stages=2, programs_per_sm=2)
# products in fp32 take more registers
FULL_PRECISION = Config(block_t=32, block_c=32, num_warps=4, num_stages=2, programs_per_sm=2)


def choose_config(t: int, n: int, dtype: torch.dtype) -> Config:
    """What t tokens of n streams are launched with."""
    if dtype == torch.float32:
        return FULL_PRECISION
    if n > 4:
        return MANY_STREAMS
    if t <= 64:
        return FEW_TOKENS
    return SOME_TOKENS if t <= 1024 else MANY_TOKENS


@triton.jit(do_not_specialize=["t", "splits", "blocks_per_split"])
def _project_kernel(
    x_ptr, stride_x_t, stride_x_n, phi_ptr, parts_ptr, t, splits, blocks_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # parts [splits, t, BLOCK_W]: the products, then the sum of squares
    STREAM_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    split = program % splits
    token = program // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = (token < t)[:, None]
    rows = x_ptr + token.to(tl.int64)[:, None] * stride_x_t
    column = tl.arange(0, BLOCK_W)
    is_column = (column < WIDTH)[:, None]
    weights = phi_ptr + column[:, None] * (N * C)
    products = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, N * STREAM_BLOCKS)):
        stream = block // STREAM_BLOCKS
        channel = (block % STREAM_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        is_x, is_phi = is_token, is_column
        if C % BLOCK_C != 0:
            is_x &= channel < C
            is_phi &= channel < C
        x = tl.load(rows + stream.to(tl.int64) * stride_x_n + channel, mask=is_x, other=0.0)
        phi = tl.load(weights + stream * C + channel, mask=is_phi, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        squares += wide * wide
        products = add_products(products, x, phi, INTERPRETED)
    row = split.to(tl.int64) * t + token
    store_part(parts_ptr, row, products, squares, is_token, WIDTH)


@triton.jit
def add_products(products, x, phi, INTERPRETED: tl.constexpr):
    """products [BLOCK_T, BLOCK_W] and x [BLOCK_T, BLOCK_C] by fp32 phi [BLOCK_W, BLOCK_C].

    As exact as fp32: phi goes in two parts of x's dtype, whose products with it are.
    """
    if tl.float32 == x.dtype:
        products = tl.dot(x, tl.trans(phi), acc=products, input_precision="ieee")
    else:
        high = round_to(phi, x.dtype, INTERPRETED)
        low = round_to(phi - high.to(tl.float32), x.dtype, INTERPRETED)
        # the interpreter multiplies matrices in fp32 alone
        FACTOR: tl.constexpr = tl.float32 if INTERPRETED else x.dtype
        high, low = high.to(FACTOR), low.to(FACTOR)
        products = tl.dot(x.to(FACTOR), tl.trans(low), acc=products)
        products = tl.dot(x.to(FACTOR), tl.trans(high), acc=products)
    return products


@triton.jit
def store_part(parts_ptr, row, products, squares, is_token, WIDTH: tl.constexpr):
    """A program's rows of `parts`: products, and in column WIDTH the sum of squares."""
    column = tl.arange(0, products.shape[1])
    total = tl.sum(squares, axis=1)
    result = tl.where((column == WIDTH)[None, :], total[:, None], products)
    at = parts_ptr + row[:, None] * products.shape[1] + column[None, :]
    tl.store(at, result, mask=is_token)


@triton.jit(do_not_specialize=["t", "iters"])
def _coefficients_kernel(
    parts_ptr, scale_ptr, bias_ptr, pre_ptr, post_ptr, comb_ptr, saved_ptr,
    t, iters, eps, norm_eps,
    N: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # saved [t, WIDTH + 1]: the products over the rms, then one over the rms
    WIDTH: tl.constexpr = N * N + 2 * N
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j, is_j = vector_columns(N, SIZE)
    entry, is_entry = matrix_columns(N, SIZE)
    is_token = token < t
    is_vector = is_token[:, None] & is_j
    is_matrix = is_token[:, None, None] & is_entry

    square = tl.zeros((BLOCK_T,), tl.float32)
    pre = tl.zeros((BLOCK_T, SIZE), tl.float32)
    post = tl.zeros((BLOCK_T, SIZE), tl.float32)
    comb = tl.zeros((BLOCK_T, SIZE, SIZE), tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts_ptr + (split * t.to(tl.int64) + token) * BLOCK_W
        square += tl.load(part + WIDTH, mask=is_token, other=0.0)
        pre += tl.load(part[:, None] + j, mask=is_vector, other=0.0)
        post += tl.load(part[:, None] + N + j, mask=is_vector, other=0.0)
        comb += tl.load(part[:, None, None] + 2 * N + entry, mask=is_matrix, other=0.0)
    rstd = tl.rsqrt(square / (N * C) + norm_eps)
    pre *= rstd[:, None]
    post *= rstd[:, None]
    comb *= rstd[:, None, None]

    saved = saved_ptr + token * (WIDTH + 1)
    tl.store(saved + WIDTH, rstd, mask=is_token)
    tl.store(saved[:, None] + j, pre, mask=is_vector)
    tl.store(saved[:, None] + N + j, post, mask=is_vector)
    tl.store(saved[:, None, None] + 2 * N + entry, comb, mask=is_matrix)

    pre = affine(pre, scale_ptr, bias_ptr, j, is_j)
    post = affine(post, scale_ptr + N, bias_ptr + N, j, is_j)
    comb = affine(comb, scale_ptr + 2 * N, bias_ptr + 2 * N, entry, is_entry)
    comb = tl.where(is_entry, row_softmax(comb, is_entry, N) + eps, 0.0)
    comb = normalised(comb, is_entry, eps, 1)
    for _ in range(iters - 1):
        comb = normalised(comb, is_entry, eps, 2)
        comb = normalised(comb, is_entry, eps, 1)
    tl.store(pre_ptr + token[:, None] * N + j, tl.sigmoid(pre) + eps, mask=is_vector)
    tl.store(post_ptr + token[:, None] * N + j, 2.0 * tl.sigmoid(post), mask=is_vector)
    tl.store(comb_ptr + token[:, None, None] * (N * N) + entry, comb, mask=is_matrix)


@triton.jit
def affine(z, scale_ptr, bias_ptr, column, is_column):
    """z times the scale of its column plus its bias."""
    scale = tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    return z * scale + tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)


def mhc_coefficients_triton(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *,
    iters: int, eps: float, norm_eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """pre, post and comb of `model1.ops.mhc.mhc_coefficients`, and what the gradient needs of z.

    The fourth, [t, n*n + 2n + 1] fp32: phi flat(x) / rms(flat(x)), and 1 / rms(flat(x)).
    """
    parts = project(x, phi, config)
    return finish(parts, x.shape, scale, bias, iters=iters, eps=eps, norm_eps=norm_eps)


def project(x: Tensor, phi: Tensor, config: Config | None = None) -> Tensor:
    """Parts of phi flat(x) and of the sum of x's squares, [splits, t, BLOCK_W] fp32."""
    check_kernel_streams(x)
    t, n, c = x.shape
    config = config or choose_config(t, n, x.dtype)
    constants = project_constants(n, c, phi.shape[0], config)
    blocks = n * -(-c // config.block_c)
    splits, blocks_per_split = choose_splits(t, blocks, config, num_sms(x.device))
    parts = torch.empty(splits, t, constants["BLOCK_W"], dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_adjacent_channels(x)
        kernel: Any = _project_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-t // config.block_t) * splits,)](
                x, x.stride(0), x.stride(1), phi.contiguous(), parts, t, splits, blocks_per_split,
                INTERPRETED=knobs.runtime.interpret, **constants,
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
    return parts


def finish(
    parts: Tensor, shape: torch.Size, scale: Tensor, bias: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `mhc_coefficients_triton` returns, from the parts and the shape of the streams."""
    (t, n, c), device = shape, parts.device
    pre, post = (torch.empty(t, n, dtype=torch.float32, device=device) for _ in range(2))
    comb = torch.empty(t, n, n, dtype=torch.float32, device=device)
    saved = torch.empty(t, n * n + 2 * n + 1, dtype=torch.float32, device=device)
    if t > 0:
        constants = matrix_constants(n, c) | {"SPLITS": len(parts)}
        kernel: Any = _coefficients_kernel
        with torch.cuda.device_of(parts):
            kernel[(-(-t // constants["BLOCK_T"]),)](
                parts, scale.contiguous(), bias.contiguous(), pre, post, comb, saved,
                t, iters, eps, norm_eps, **constants, **launch_options(1, 1),
            )  # fmt: skip
    return pre, post, comb, saved


def with_adjacent_channels(x: Tensor) -> Tensor:
    """x itself wherever its tokens and streams lie, a copy if channels are apart."""
    return x if x.stride(2) == 1 else x.contiguous()


def choose_splits(t: int, blocks: int, config: Config, sms: int) -> tuple[int, int]:
    """Parts that blocks of channels are cut into, a power of two, and the blocks in each.

    As many as run at once: one more program than that would wait for all others.
    """
    tiles, splits = max(1, -(-t // config.block_t)), 1
    limit = min(MAX_SPLITS, blocks, config.programs_per_sm * sms // tiles)
    while 2 * splits <= limit:
        splits *= 2
    return splits, -(-blocks // splits)


def project_constants(n: int, c: int, width: int, config: Config) -> dict[str, Any]:
    """Sizes of the streams, and of the blocks that a projection to width cuts them into."""
    return {
        "N": n, "C": c, "WIDTH": width, "BLOCK_T": config.block_t, "BLOCK_C": config.block_c,
        "BLOCK_W": block_width(width),
    }  # fmt: skip


def matrix_constants(n: int, c: int) -> dict[str, Any]:
    """The same for the kernels that hold a token's matrix in registers."""
    size = triton.next_power_of_2(n)
    return {
        "N": n, "C": c, "SIZE": size, "BLOCK_T": max(1, MATRIX_ENTRIES // size**2),
        "BLOCK_W": block_width(n * n + 2 * n),
    }  # fmt: skip


def block_width(width: int) -> int:
    """Columns of a projection and one more, at least what a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(width + 1)))


TYPES = {
    "x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "grad_ptr": "*bf16",
    "d_x_ptr": "*bf16", "d_y_ptr": "*bf16", "passed_ptr": "*bf16", "d_u_ptr": "*bf16",
    "through_ptr": "*bf16", "short_ptr": "*bf16", "u_ptr": "*bf16",
    "eps": "fp32", "norm_eps": "fp32",
}  # fmt: skip
SHIPPED = (4, 4096)  # n, c
SHIPPED_WIDTH = 24  # columns of their projection


def compile_case(
    name: str, kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int = 1
) -> CompileCase:
    """A kernel of this operator over adjacent bf16 streams with fp32 parameters."""
    n, c = SHIPPED
    strides = {"stride_x_t": n * c, "stride_x_n": c, "INTERPRETED": False}
    constants = constants | {k: v for k, v in strides.items() if k in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        other = "*fp32" if argument.endswith("_ptr") else "i32"
        types[argument] = "constexpr" if argument in constants else TYPES.get(argument, other)
    return CompileCase(name, kernel, types, constants, num_warps, num_stages)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Coefficients of four streams of 4096 channels."""
    last = matrix_constants(*SHIPPED)
    cases = []
    for name, config, splits in (
        ("many tokens", MANY_TOKENS, 4),
        ("some tokens", SOME_TOKENS, 8),
        ("few tokens", FEW_TOKENS, 16),
    ):
        constants = project_constants(*SHIPPED, SHIPPED_WIDTH, config)
        constants["INTERPRETED"], stages = False, config.num_stages
        cases += [
            compile_case(f"project {name}", _project_kernel, constants, config.num_warps, stages),
            compile_case(f"finish {name}", _coefficients_kernel, last | {"SPLITS": splits}, 1),
        ]
    return cases

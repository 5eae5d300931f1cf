"""Triton kernels for two sublayers' seam, forward: what `model1.ops.mhc.chain` says in one pass.

`_collapse_norm_fwd_kernel` holds all channels of a token's collapse, whose root mean square it
needs. `_write_back_project_fwd_kernel` mixes a tile of tokens, and multiplies what it stores by the
next sublayer's phi while it is in registers: phi is read once a tile, from the L2 cache, the
streams once in all. Where tiles are few, programs share out the channels and leave parts, as the
unfused projection does; its second kernel adds them up and does the rounds.

What bounds it is how much of the streams is on its way: 4.3 TB/s times a microsecond of latency is
4.3 MB, 33 KB for each of an H200's 132 SMs. One tile of 64 tokens by 32 channels is 20 KB of x and
y, which a program that loads, waits, multiplies and stores has on its way half of the time. So
loads run stages ahead of the products, by asynchronous copies to shared memory.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportArgumentType=none

from __future__ import annotations

from dataclasses import dataclass, replace
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
    block_width,
    choose_splits,
    compile_case,
    finish,
    mhc_coefficients_triton,
    pinned,
    project_constants,
    register_kind,
    store_part,
    with_adjacent_channels,
)
from model1.ops.mhc.portable_streams import (
    mhc_write_back_triton,
    numbers,
    streams,
    tiles,
    weighted_sum,
)
from model1.ops.rounding import round_to

# Of one thread of a program that holds a whole token, as far as MAX_WARPS allows.
CHANNELS_PER_THREAD = 16
MAX_WARPS = 16
RUN = 8  # neighbours of which a thread adds up the squares
SPLIT_CHANNELS = 64


@dataclass(frozen=True)
class FusedConfig(Config):
    """How write-back and projection are cut; num_stages tiles of x, y and phi are on their way.

    is_split: a kernel before splits phi into two parts of x's dtype, which then go to the matrix
    units from where they arrive. prefetch: the next tile waits in registers instead of shared
    memory. max_registers: so that programs_per_sm fit.
    """

    is_split: bool = False
    prefetch: bool = False
    max_registers: int | None = None


# On an H200, 2026-12-01, none was faster than write-back and coefficients one after the other: with
# 8192 tokens of 4 streams of 4096 channels 255 to 357 us against 250, with 16384 of 7168 933 to
# 1376 against 769. Bytes of x and y on their way to an SM at any time are programs_per_sm *
# (num_stages - 1) * block_t * block_c * 10; phi is read from the L2 cache once a tile of tokens,
# 96 * n * c bytes each: of the streams' bytes 1/3 for tiles of 64 tokens, 1/6 for tiles of 128.
FUSED = {
    # 82 KB
    "64x32": FusedConfig(64, 32, 8, 3, 2, max_registers=128),
    # 123 KB
    "128x16 split": FusedConfig(128, 16, 8, 4, 2, is_split=True, max_registers=128),
    # 92 KB
    "64x16 split": FusedConfig(64, 16, 4, 4, 3, is_split=True),
    # 41 KB, and no phi in registers
    "64x32 split": FusedConfig(64, 32, 8, 3, 1, is_split=True),
    # 61 KB, but phi takes as many bytes as two thirds of the streams
    "32x32 split": FusedConfig(32, 32, 4, 3, 3, is_split=True),
    # 20 KB of two programs
    "32x32 prefetch": FusedConfig(32, 32, 4, 1, 2, prefetch=True),
}


def choose_config(t: int, n: int, dtype: torch.dtype) -> FusedConfig | None:
    """How the fused kernel is cut; None for write-back and coefficients one after the other."""
    return None


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
def _split_phi_kernel(
    phi_ptr, out_ptr, K, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # out [2 WIDTH, K]: phi rounded, then what that leaves
    column = tl.arange(0, BLOCK_W)[:, None]
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (column < WIDTH) & (channel < K)
    at = column * K + channel
    phi = tl.load(phi_ptr + at, mask=inside, other=0.0).to(tl.float32)
    high = round_to(phi, out_ptr.dtype.element_ty, INTERPRETED)
    low = round_to(phi - high.to(tl.float32), out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + at, high, mask=inside)
    tl.store(out_ptr + WIDTH * K + at, low, mask=inside)


@triton.jit
def prefetched(
    x_ptr, stride_x_t, stride_x_n, y_ptr, row, is_token, block,
    N: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles of y and of every stream, in their own dtype; 0 from channel C on."""
    channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    is_x = is_token & (channel < C)
    y = tl.load(y_ptr + row * C + channel, mask=is_x, other=0.0)
    return y, tiles(x_ptr, stride_x_n, row * stride_x_t + channel, is_x, N)


@triton.jit(do_not_specialize=["t", "splits", "blocks_per_split"])
def _write_back_project_fwd_kernel(
    x_ptr, stride_x_t, stride_x_n, y_ptr, post_ptr, comb_ptr, phi_ptr, out_ptr, parts_ptr,
    t, splits, blocks_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, REGISTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    IS_SPLIT: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # phi [WIDTH, N C] fp32, or if IS_SPLIT [2 WIDTH, N C] in x's dtype.
    # parts [splits, t, BLOCK_W]: the products, then the sum of squares.
    INTERPRETED: tl.constexpr = REGISTER == ""
    # the interpreter multiplies matrices in fp32 alone
    FACTOR: tl.constexpr = tl.float32 if INTERPRETED else out_ptr.dtype.element_ty
    BLOCK_ROWS: tl.constexpr = 2 * BLOCK_W if IS_SPLIT else BLOCK_W
    split = tl.program_id(0) % splits
    tile = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[:, None]
    is_token = tile + row < t
    column = tl.arange(0, BLOCK_ROWS)[:, None]
    is_column = column % BLOCK_W < WIDTH
    column = column // BLOCK_W * WIDTH + column % BLOCK_W
    # 32 bits are enough from a tile's first number to its others
    x_ptr += tile * stride_x_t
    y_ptr += tile * C
    out_ptr += tile * (N * C)
    post = token_weights(post_ptr + tile * N, is_token, N, N)
    comb = token_weights(comb_ptr + tile * (N * N), is_token, N * N, N * N)
    products = tl.zeros((BLOCK_T, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C // RUN), tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, (C + BLOCK_C - 1) // BLOCK_C)
    if PREFETCH:
        y, x = prefetched(x_ptr, stride_x_t, stride_x_n, y_ptr, row, is_token, first, N, C, BLOCK_C)
    for block in tl.range(first, last, num_stages=STAGES):
        channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        is_x, is_phi = is_token, is_column
        if C % BLOCK_C != 0:
            is_x &= channel < C
            is_phi &= channel < C
        if PREFETCH:
            # past the last block nothing is read
            more = is_token & (block + 1 < last)
            next_y, next_x = prefetched(
                x_ptr, stride_x_t, stride_x_n, y_ptr, row, more, block + 1, N, C, BLOCK_C
            )
        else:
            y = tl.load(y_ptr + row * C + channel, mask=is_x, other=0.0)
            x = tiles(x_ptr, stride_x_n, row * stride_x_t + channel, is_x, N)
        for k in tl.static_range(N):
            phi = tl.load(phi_ptr + k * C + (column * (N * C) + channel), mask=is_phi, other=0.0)
            out = written(x, y, post, comb, k, N)
            out = round_to(out, out_ptr.dtype.element_ty, INTERPRETED)
            tl.store(out_ptr + k * C + (row * (N * C) + channel), out, mask=is_x)
            # statistics are of the streams as they are stored
            wide = out.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_T, BLOCK_C // RUN, RUN)), axis=2)
            if IS_SPLIT:
                factor = pinned(out, REGISTER).to(FACTOR)
                products = tl.dot(factor, tl.trans(phi.to(FACTOR)), acc=products)
            else:
                products = add_products(products, out, phi.to(tl.float32), INTERPRETED, REGISTER)
        if PREFETCH:
            y, x = next_y, next_x
    if IS_SPLIT:
        products = tl.sum(tl.reshape(products, (BLOCK_T, 2, BLOCK_W)), axis=1)
    part = split.to(tl.int64) * t + tile + tl.arange(0, BLOCK_T)
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
    """The new streams, then what `mhc_coefficients_triton` returns for them.

    config: of the fused kernel; without one, `choose_config` says what runs.
    """
    check_kernel_streams(x)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    config = config or choose_config(x.shape[0], x.shape[1], x.dtype)
    if config is None:
        out = mhc_write_back_triton(x, y, post, comb)
        return out, *mhc_coefficients_triton(out, phi, scale, bias, **options)
    out, parts = write_back_project(x, y, post, comb, phi, config)
    return out, *finish(parts, out.shape, scale, bias, **options)


def write_back_project(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, config: FusedConfig
) -> tuple[Tensor, Tensor]:
    """The new streams, and of them what `project` returns."""
    t, n, c = x.shape
    out = torch.empty(t, n, c, dtype=x.dtype, device=x.device)
    constants = fused_constants(n, c, phi.shape[0], config)
    blocks = -(-c // config.block_c)
    splits, blocks_per_split = choose_splits(t, blocks, config, num_sms(x.device))
    parts = torch.empty(splits, t, constants["BLOCK_W"], dtype=torch.float32, device=x.device)
    if t > 0:
        x = with_near_tokens(x, config.block_t)
        phi = split_phi(phi, x.dtype) if config.is_split else phi.contiguous()
        target = device_target(x.device)
        kernel: Any = _write_back_project_fwd_kernel
        with torch.cuda.device_of(x):
            kernel[(-(-t // config.block_t) * splits,)](
                x, x.stride(0), x.stride(1), y.contiguous(), post.contiguous(), comb.contiguous(),
                phi, out, parts, t, splits, blocks_per_split,
                REGISTER=register_kind(target), **constants,
                **fused_options(config, target),
            )  # fmt: skip
    return out, parts


def split_phi(phi: Tensor, dtype: torch.dtype) -> Tensor:
    """phi [w, k] as two parts of a dtype, [2 w, k]: their sum is as exact as fp32 is, nearly."""
    width, k = phi.shape
    out = torch.empty(2 * width, k, dtype=dtype, device=phi.device)
    kernel: Any = _split_phi_kernel
    with torch.cuda.device_of(phi):
        kernel[(-(-k // SPLIT_CHANNELS),)](
            phi.contiguous(), out, k, WIDTH=width, INTERPRETED=knobs.runtime.interpret,
            BLOCK_C=SPLIT_CHANNELS, BLOCK_W=block_width(width), **launch_options(4, 1),
        )  # fmt: skip
    return out


def fused_constants(n: int, c: int, width: int, config: FusedConfig) -> dict[str, Any]:
    """Constants of the fused kernel but REGISTER."""
    return project_constants(n, c, width, config) | {
        "IS_SPLIT": config.is_split, "PREFETCH": config.prefetch, "STAGES": config.num_stages,
        "RUN": RUN,
    }  # fmt: skip


def fused_options(config: FusedConfig, target: KernelTarget) -> dict[str, Any]:
    """The loop says itself how many stages it has; AMD's compiler takes no limit of registers."""
    options = launch_options(config.num_warps, 1)
    if config.max_registers is not None and target.kind == "cuda":
        options["maxnreg"] = config.max_registers
    return options


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
    # not launched unless asked for, and cut for one GPU
    for name, config in FUSED.items() if target == KernelTarget("cuda", 90) else ():
        constants = fused_constants(*SHIPPED, SHIPPED_WIDTH, config)
        constants["REGISTER"] = register_kind(target)
        name, kernel = f"write back and project {name}", _write_back_project_fwd_kernel
        case = compile_case(name, kernel, constants, config.num_warps)
        signature = dict(case.signature)
        if config.is_split:
            signature["phi_ptr"] = "*bf16"
        cases.append(replace(case, signature=signature, max_registers=config.max_registers))
    return cases

"""Triton kernels for Engram's short convolution over packed documents, forward and backward.

A first pass leaves one number per token and stream, the inverse rms. Then a program has a tile of
tokens and channels and reads it once for each tap; what neighbours have read is in a cache. The
gradient goes to the sum under the SiLU first, then from all taps back to a token's channels. What
the norm's gradient needs of a whole row is added up on the way, tap by tap: no row is read twice.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type; loops over
# tl.static_range exist only while a kernel is compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

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
from model1.ops.partial_sums import sum_parts
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut, in this way alone measured. Results do not depend on how many tokens."""

    tokens: int = 32  # of a tile; the more, the fewer rows are read for taps alone
    channels: int = 128
    sum_tokens: int = 8  # of a step of the first pass backward, which keeps more numbers
    tokens_per_sum: int = 64  # whose weight gradients one program adds up
    row_tokens: int = 4  # of a program that sums over all channels
    row_channels: int = 512
    num_warps: int = 8
    sum_warps: int = 4


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def _engram_conv_rstd_kernel(
    x_ptr, stride_x, rstd_ptr, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    is_row = row < num_tokens.to(tl.int64) * N
    x_row = x_ptr + row // N * stride_x + row % N * D
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None]
        x = _load(x_row + channel, is_row & (channel < D))
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=is_row)


@triton.jit
def _taps(
    x_ptr, stride_x, rstd_ptr, position, token, stream, channel,
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """The normalised tile that each tap sees, oldest first; position, token: of its rows.

    They are vectors, so that a thread loads the numbers of its rows once and not per channel.
    """
    seen = ()
    for tap in tl.static_range(K):
        back = (K - 1 - tap) * DILATION
        source = token - back
        is_inside = (position >= back) & (source >= 0)
        rstd = _load(rstd_ptr + source * N + stream, is_inside)
        x_at = x_ptr + source[:, None] * stride_x + stream * D + channel
        seen += (_load(x_at, is_inside[:, None] & (channel < D)) * rstd[:, None],)
    return seen


@triton.jit
def _weights(taps_ptr, stream, channel, N: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """Of every tap; see `_scaled_taps`."""
    weights = ()
    for tap in tl.static_range(K):
        weights += (_load(taps_ptr + (tap * N + stream) * D + channel, channel < D),)
    return weights


@triton.jit
def _weighted_sum(seen, weights, K: tl.constexpr):
    total = seen[0] * weights[0]
    for tap in tl.static_range(1, K):
        total += seen[tap] * weights[tap]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_fwd_kernel(
    x_ptr, stride_x, rstd_ptr, positions_ptr, taps_ptr, out_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    token = (program // (NUM_CHUNKS * N)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    stream = (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    is_here = (token < num_tokens)[:, None] & (channel < D)
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
    weights = _weights(taps_ptr, stream, channel, N, D, K)
    seen = _taps(x_ptr, stride_x, rstd_ptr, position, token, stream, channel, D, N, K, DILATION)
    total = _weighted_sum(seen, weights, K)
    out = round_to(total / (1.0 + tl.exp(-total)), out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + (token[:, None] * N + stream) * D + channel, out, mask=is_here)


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_sum_bwd_kernel(
    grad_ptr, x_ptr, stride_x, rstd_ptr, positions_ptr, taps_ptr,
    d_sum_ptr, partial_ptr, dots_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # d_sum, the sums over tokens of d_sum y for each tap, and the dots over these channels of
    # d_sum y weight for each tap and token
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    chunk, plane = program % NUM_CHUNKS, num_tokens.to(tl.int64) * N
    part = (program // (NUM_CHUNKS * N)).to(tl.int64)
    stream = (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    weights = _weights(taps_ptr, stream, channel, N, D, K)
    sums = ()
    for _ in tl.static_range(K):
        sums += (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    for start in range(0, TOKENS, BLOCK_T):
        token = part * TOKENS + start + tl.arange(0, BLOCK_T)
        is_here = (token < num_tokens)[:, None] & (channel < D)
        position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
        seen = _taps(x_ptr, stride_x, rstd_ptr, position, token, stream, channel, D, N, K, DILATION)
        total = _weighted_sum(seen, weights, K)
        at = (token[:, None] * N + stream) * D + channel
        sigmoid = 1.0 / (1.0 + tl.exp(-total))
        d_sum = _load(grad_ptr + at, is_here) * sigmoid * (1.0 + total * (1.0 - sigmoid))
        rounded = round_to(d_sum, d_sum_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_sum_ptr + at, rounded, mask=is_here)
        new = ()
        for tap in tl.static_range(K):
            product = d_sum * seen[tap]
            new += (sums[tap] + product,)
            dot = tl.sum(product * weights[tap], axis=1)
            dot_at = dots_ptr + (chunk * K + tap) * plane + token * N + stream
            tl.store(dot_at, dot, mask=token < num_tokens)
        sums = new
    for tap in tl.static_range(K):
        row = partial_ptr + ((part * K + tap) * N + stream) * D
        tl.store(row + channel, tl.sum(sums[tap], axis=0)[None], mask=channel < D)


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_mean_bwd_kernel(
    dots_ptr, positions_ptr, mean_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    # mean(v y) of every token and stream: the dots of the tokens whose taps see it
    plane = num_tokens.to(tl.int64) * N
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None]
    chunk = tl.arange(0, BLOCK_CHUNKS)[:, None]
    total = tl.zeros((BLOCK_CHUNKS, BLOCK), tl.float32)
    for tap in tl.static_range(K):
        back = (K - 1 - tap) * DILATION
        later = at + back * N
        position = tl.load(positions_ptr + later // N, mask=later < plane, other=-1)
        mask = (chunk < NUM_CHUNKS) & (position >= back)
        total += _load(dots_ptr + (chunk * K + tap) * plane + later, mask)
    tl.store(mean_ptr + at, tl.sum(total, axis=0)[None] / D, mask=at < plane)


@triton.jit
def _back_from_taps(
    d_sum_ptr, positions_ptr, token, stream, channel, weights, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """What reaches the normalised tile from the tokens whose taps see it."""
    total = tl.zeros((token.shape[0], channel.shape[1]), tl.float32)
    for tap in tl.static_range(K):
        back = (K - 1 - tap) * DILATION
        later = token + back
        position = tl.load(positions_ptr + later, mask=later < num_tokens, other=-1)
        at = d_sum_ptr + (later[:, None] * N + stream) * D + channel
        total += _load(at, (position >= back)[:, None] & (channel < D)) * weights[tap]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_row_bwd_kernel(
    d_sum_ptr, x_ptr, stride_x, rstd_ptr, mean_ptr, positions_ptr, taps_ptr, d_x_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # v = what comes from the taps, y = x / rms:  d_x = (v - y mean(v y)) / rms
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    token = (program // (NUM_CHUNKS * N)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    stream = (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    is_here = (token < num_tokens)[:, None] & (channel < D)
    rstd = _load(rstd_ptr + token * N + stream, token < num_tokens)[:, None]
    mean = _load(mean_ptr + token * N + stream, token < num_tokens)[:, None]
    weights = _weights(taps_ptr, stream, channel, N, D, K)
    v = _back_from_taps(
        d_sum_ptr, positions_ptr, token, stream, channel, weights, num_tokens, N, D, K, DILATION
    )
    y = _load(x_ptr + token[:, None] * stride_x + stream * D + channel, is_here) * rstd
    d_x = round_to((v - y * mean) * rstd, d_x_ptr.dtype.element_ty, INTERPRETED)
    tl.store(d_x_ptr + (token[:, None] * N + stream) * D + channel, d_x, mask=is_here)


def engram_causal_conv_triton(
    x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int, eps: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `model1.ops.engram.conv.engram_causal_conv`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config, x = config or Config(), _rows(x)
    sizes, common = _sizes(norm_weight, weight, dilation, config)
    kernel: Any = _engram_conv_fwd_kernel
    with torch.cuda.device_of(x):
        rstd = _inverse_rms(x, norm_weight, eps, config)
        kernel[(-(-len(x) // config.tokens) * _num_chunks(sizes),)](
            x, x.stride(0), rstd, positions.contiguous(), _scaled_taps(weight, norm_weight), out,
            len(x), **sizes, **common,
        )  # fmt: skip
    return out


def engram_causal_conv_backward_triton(
    grad: Tensor, x: Tensor, positions: Tensor, weight: Tensor, norm_weight: Tensor,
    dilation: int, eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.engram.ref.engram_causal_conv_backward_ref`."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if d_x.numel() == 0:
        return d_x, torch.zeros_like(weight), torch.zeros_like(norm_weight)
    config, x, num_taps = config or Config(), _rows(x), weight.shape[1]
    sizes, common = _sizes(norm_weight, weight, dilation, config)
    num_parts, (n, d) = -(-len(x) // config.tokens_per_sum), norm_weight.shape
    sums = _sum_sizes(sizes, config)
    num_chunks = _num_chunks(sizes) // n
    d_sum = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial, dots, mean, by_tap = _scratch(
        x, (num_parts, num_taps, n * d), (num_chunks, num_taps, len(x), n), (len(x), n),
        (num_taps, n * d),
    )  # fmt: skip
    positions, taps = positions.contiguous(), _scaled_taps(weight, norm_weight)
    mean_sizes = _mean_sizes(sizes)
    with torch.cuda.device_of(x):
        rstd = _inverse_rms(x, norm_weight, eps, config)
        kernel: Any = _engram_conv_sum_bwd_kernel
        kernel[(num_parts * n * num_chunks,)](
            grad.contiguous(), x, x.stride(0), rstd, positions, taps, d_sum, partial, dots, len(x),
            **sums, **common | launch_options(config.sum_warps, 1),
        )  # fmt: skip
        kernel = _engram_conv_mean_bwd_kernel
        kernel[(-(-mean.numel() // mean_sizes["BLOCK"]),)](
            dots, positions, mean, len(x), **mean_sizes, **launch_options(config.num_warps, 1)
        )
        kernel = _engram_conv_row_bwd_kernel
        kernel[(-(-len(x) // config.tokens) * n * num_chunks,)](
            d_sum, x, x.stride(0), rstd, mean, positions, taps, d_x, len(x), **sizes, **common
        )
        sum_parts(partial, by_tap)
    by_tap = by_tap.T.contiguous()
    d_weight = by_tap * norm_weight.float().reshape(-1, 1)
    d_norm_weight = (by_tap * weight.float()).sum(1).view(norm_weight.shape)
    return d_x, d_weight.to(weight.dtype), d_norm_weight.to(norm_weight.dtype)


def _scratch(x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring channels, a copy only where they are apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _scaled_taps(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """The taps [taps, n * d] fp32, the norm's weight included, with neighbouring channels."""
    taps = torch.empty(weight.shape[::-1], dtype=torch.float32, device=weight.device)
    return torch.mul(weight.T.float(), norm_weight.float().reshape(1, -1), out=taps)


def _inverse_rms(x: Tensor, norm_weight: Tensor, eps: float, config: Config) -> Tensor:
    n, d = norm_weight.shape
    rstd = torch.empty((len(x), n), dtype=torch.float32, device=x.device)
    kernel: Any = _engram_conv_rstd_kernel
    kernel[(-(-rstd.numel() // config.row_tokens),)](
        x, x.stride(0), rstd, len(x), eps, **_row_sizes(n, d, config),
        **launch_options(config.num_warps, 1),
    )  # fmt: skip
    return rstd


def _row_sizes(n: int, d: int, config: Config) -> dict[str, Any]:
    block_c = min(config.row_channels, triton.next_power_of_2(d))
    return {"N": n, "D": d, "BLOCK_R": config.row_tokens, "BLOCK_C": block_c}


def _sizes(
    norm_weight: Tensor, weight: Tensor, dilation: int, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of the tiles, and what all launches share."""
    n, d = norm_weight.shape
    sizes = {"N": n, "D": d, "K": weight.shape[1], "DILATION": dilation}
    sizes |= {"BLOCK_T": config.tokens}
    sizes |= {"BLOCK_C": min(config.channels, triton.next_power_of_2(d))}
    common = {"INTERPRETED": knobs.runtime.interpret, **launch_options(config.num_warps, 1)}
    return sizes, common


def _sum_sizes(sizes: dict[str, Any], config: Config) -> dict[str, Any]:
    step = min(config.sum_tokens, config.tokens_per_sum)
    return sizes | {"BLOCK_T": step, "TOKENS": config.tokens_per_sum}


def _mean_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    chunks = -(-sizes["D"] // sizes["BLOCK_C"])
    kept = {name: sizes[name] for name in ("N", "D", "K", "DILATION")}
    block_chunks = triton.next_power_of_2(chunks)
    return kept | {"NUM_CHUNKS": chunks, "BLOCK_CHUNKS": block_chunks, "BLOCK": 32}


def _num_chunks(sizes: dict[str, Any]) -> int:
    return sizes["N"] * -(-sizes["D"] // sizes["BLOCK_C"])


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels, four taps a trigram apart."""
    config, cases = Config(), []
    tiles = {"N": 4, "D": 4096, "K": 4, "DILATION": 3, "stride_x": 4 * 4096}
    tiles |= {"BLOCK_T": config.tokens, "BLOCK_C": config.channels, "INTERPRETED": False}
    sums = _sum_sizes(tiles, config)
    rows = tiles | _row_sizes(4, 4096, config)
    half = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "d_sum_ptr", "d_x_ptr"), "*bf16")
    single = dict.fromkeys(("rstd_ptr", "taps_ptr", "partial_ptr", "dots_ptr", "mean_ptr"), "*fp32")
    numbers = {"positions_ptr": "*i64", "num_tokens": "i32", "eps": "fp32"}
    for kernel, name, sizes in (
        (_engram_conv_rstd_kernel, "rms", rows),
        (_engram_conv_fwd_kernel, "forward", tiles),
        (_engram_conv_sum_bwd_kernel, "backward, sum", sums),
        (_engram_conv_mean_bwd_kernel, "backward, mean", _mean_sizes(tiles)),
        (_engram_conv_row_bwd_kernel, "backward, rows", tiles),
    ):
        own = {x: value for x, value in sizes.items() if x in kernel.arg_names}
        cases.append(
            CompileCase(
                name=f"engram_conv {name}",
                kernel=kernel,
                signature=half | single | numbers | dict.fromkeys(own, "constexpr"),
                constexprs=own,
                num_warps=config.sum_warps if sizes is sums else config.num_warps,
                num_stages=1,
            )
        )
    return cases

"""Triton kernels for Engram's short convolution over packed documents, forward and backward.

A first pass leaves one number per token and stream, the inverse rms. Then a program has a tile of
tokens and channels and reads it once for each tap; what neighbours have read is in a cache. The
gradient goes to the sum under the SiLU first, then from all taps back to a token's channels.
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
    """How the work is cut. Not yet measured. Results do not depend on the number of tokens."""

    tokens: int = 8  # of a tile
    channels: int = 128
    tokens_per_sum: int = 64  # whose weight gradients one program adds up
    row_tokens: int = 4  # of a program that sums over all channels
    row_channels: int = 256
    num_warps: int = 4


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
    x_ptr, stride_x, rstd_ptr, position, token, stream, channel, is_here,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """The normalised tile that each tap sees, oldest first."""
    seen = ()
    for tap in tl.static_range(K):
        back = (K - 1 - tap) * DILATION
        source = token - back
        is_inside = is_here & (position >= back) & (source >= 0)
        x = _load(x_ptr + source * stride_x + stream * D + channel, is_inside)
        rstd = _load(rstd_ptr + source * N + stream, (position >= back) & (source >= 0))
        seen += (x * rstd,)
    return seen


@triton.jit
def _weights(weight_ptr, norm_weight_ptr, stream, channel, D: tl.constexpr, K: tl.constexpr):
    """Of every tap, the norm's weight included."""
    at = stream * D + channel
    scale = _load(norm_weight_ptr + at, channel < D)
    weights = ()
    for tap in tl.static_range(K):
        weights += (scale * _load(weight_ptr + at * K + tap, channel < D),)
    return weights


@triton.jit
def _weighted_sum(seen, weights, K: tl.constexpr):
    total = seen[0] * weights[0]
    for tap in tl.static_range(1, K):
        total += seen[tap] * weights[tap]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_fwd_kernel(
    x_ptr, stride_x, rstd_ptr, positions_ptr, weight_ptr, norm_weight_ptr, out_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    token = (program // (NUM_CHUNKS * N)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    stream = (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    is_here = (token < num_tokens) & (channel < D)
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
    weights = _weights(weight_ptr, norm_weight_ptr, stream, channel, D, K)
    seen = _taps(
        x_ptr, stride_x, rstd_ptr, position, token, stream, channel, is_here, N, D, K, DILATION
    )
    total = _weighted_sum(seen, weights, K)
    out = round_to(total / (1.0 + tl.exp(-total)), out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + (token * N + stream) * D + channel, out, mask=is_here)


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_sum_bwd_kernel(
    grad_ptr, x_ptr, stride_x, rstd_ptr, positions_ptr, weight_ptr, norm_weight_ptr,
    d_sum_ptr, partial_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    part = (program // (NUM_CHUNKS * N)).to(tl.int64)
    stream = (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None]
    weights = _weights(weight_ptr, norm_weight_ptr, stream, channel, D, K)
    sums = ()
    for _ in tl.static_range(K):
        sums += (tl.zeros((1, BLOCK_C), tl.float32),)
    for start in range(0, TOKENS, BLOCK_T):
        token = part * TOKENS + start + tl.arange(0, BLOCK_T)[:, None]
        is_here = (token < num_tokens) & (channel < D)
        position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
        seen = _taps(
            x_ptr, stride_x, rstd_ptr, position, token, stream, channel, is_here, N, D, K, DILATION
        )
        total = _weighted_sum(seen, weights, K)
        at = (token * N + stream) * D + channel
        sigmoid = 1.0 / (1.0 + tl.exp(-total))
        d_sum = _load(grad_ptr + at, is_here) * sigmoid * (1.0 + total * (1.0 - sigmoid))
        rounded = round_to(d_sum, d_sum_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_sum_ptr + at, rounded, mask=is_here)
        new = ()
        for tap in tl.static_range(K):
            new += (sums[tap] + tl.sum(d_sum * seen[tap], axis=0)[None],)
        sums = new
    for tap in tl.static_range(K):
        row = partial_ptr + ((part * K + tap) * N + stream) * D
        tl.store(row + channel, sums[tap], mask=channel < D)


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
        at = d_sum_ptr + (later * N + stream) * D + channel
        total += _load(at, (position >= back) & (channel < D)) * weights[tap]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_conv_row_bwd_kernel(
    d_sum_ptr, x_ptr, stride_x, rstd_ptr, positions_ptr, weight_ptr, norm_weight_ptr, d_x_ptr,
    num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # v = what comes from the taps, y = x / rms:  d_x = (v - y mean(v y)) / rms
    token = (tl.program_id(0) // N).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    stream = (tl.program_id(0) % N).to(tl.int64)
    is_token = token < num_tokens
    rstd = _load(rstd_ptr + token * N + stream, is_token)
    products = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None]
        weights = _weights(weight_ptr, norm_weight_ptr, stream, channel, D, K)
        v = _back_from_taps(
            d_sum_ptr, positions_ptr, token, stream, channel, weights, num_tokens, N, D, K, DILATION
        )
        x_at = x_ptr + token * stride_x + stream * D + channel
        products += v * _load(x_at, is_token & (channel < D)) * rstd
    mean = tl.sum(products, axis=1)[:, None] / D
    for start in range(0, D, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None]
        is_here = is_token & (channel < D)
        weights = _weights(weight_ptr, norm_weight_ptr, stream, channel, D, K)
        v = _back_from_taps(
            d_sum_ptr, positions_ptr, token, stream, channel, weights, num_tokens, N, D, K, DILATION
        )
        y = _load(x_ptr + token * stride_x + stream * D + channel, is_here) * rstd
        d_x = round_to((v - y * mean) * rstd, d_x_ptr.dtype.element_ty, INTERPRETED)
        tl.store(d_x_ptr + (token * N + stream) * D + channel, d_x, mask=is_here)


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
            x, x.stride(0), rstd, positions.contiguous(), weight.contiguous(),
            norm_weight.contiguous(), out, len(x), **sizes, **common,
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
    num_parts = -(-len(x) // config.tokens_per_sum)
    d_sum = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(
        (num_parts, num_taps, x.shape[1]), dtype=torch.float32, device=x.device
    )  # fmt: skip
    by_tap = torch.empty(partial.shape[1:], dtype=torch.float32, device=x.device)
    parameters = (positions.contiguous(), weight.contiguous(), norm_weight.contiguous())
    rows = sizes | {"BLOCK_T": config.row_tokens}
    rows["BLOCK_C"] = min(config.row_channels, triton.next_power_of_2(rows["D"]))
    kernels: tuple[Any, ...] = (_engram_conv_sum_bwd_kernel, _engram_conv_row_bwd_kernel)
    with torch.cuda.device_of(x):
        rstd = _inverse_rms(x, norm_weight, eps, config)
        kernels[0][(num_parts * _num_chunks(sizes),)](
            grad.contiguous(), x, x.stride(0), rstd, *parameters, d_sum, partial, len(x),
            TOKENS=config.tokens_per_sum, **sizes, **common,
        )  # fmt: skip
        kernels[1][(-(-len(x) // config.row_tokens) * rows["N"],)](
            d_sum, x, x.stride(0), rstd, *parameters, d_x, len(x), **rows, **common
        )
        sum_parts(partial, by_tap)
    by_tap = by_tap.T.contiguous()
    d_weight = by_tap * norm_weight.float().reshape(-1, 1)
    d_norm_weight = (by_tap * weight.float()).sum(1).view(norm_weight.shape)
    return d_x, d_weight.to(weight.dtype), d_norm_weight.to(norm_weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring channels, a copy only where they are apart."""
    return x if x.stride(1) == 1 else x.contiguous()


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


def _num_chunks(sizes: dict[str, Any]) -> int:
    return sizes["N"] * -(-sizes["D"] // sizes["BLOCK_C"])


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels, four taps a trigram apart."""
    config, cases = Config(), []
    tiles = {"N": 4, "D": 4096, "K": 4, "DILATION": 3, "stride_x": 4 * 4096}
    tiles |= {"BLOCK_T": config.tokens, "BLOCK_C": config.channels, "INTERPRETED": False}
    tiles |= {"TOKENS": config.tokens_per_sum}
    rows = tiles | {"BLOCK_T": config.row_tokens, **_row_sizes(4, 4096, config)}
    half = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "d_sum_ptr", "d_x_ptr"), "*bf16")
    single = dict.fromkeys(("rstd_ptr", "weight_ptr", "norm_weight_ptr", "partial_ptr"), "*fp32")
    numbers = {"positions_ptr": "*i64", "num_tokens": "i32", "eps": "fp32"}
    for kernel, name, sizes in (
        (_engram_conv_rstd_kernel, "rms", rows),
        (_engram_conv_fwd_kernel, "forward", tiles),
        (_engram_conv_sum_bwd_kernel, "backward, sum", tiles),
        (_engram_conv_row_bwd_kernel, "backward, rows", rows),
    ):
        own = {x: value for x, value in sizes.items() if x in kernel.arg_names}
        cases.append(
            CompileCase(
                name=f"engram_conv {name}",
                kernel=kernel,
                signature=half | single | numbers | dict.fromkeys(own, "constexpr"),
                constexprs=own,
                num_warps=config.num_warps,
                num_stages=1,
            )
        )
    return cases

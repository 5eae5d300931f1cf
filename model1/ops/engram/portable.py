"""Triton kernels for Engram's gate, forward and backward.

A token's streams are one tile: a block of channels of all of them at a time, and one sum over the
channels at the end. The gradient takes two passes, as everything of h and key waits for the sum
over out's gradient: the first reads that and value and leaves three numbers per token and stream,
the second reads h and key once, and adds up the weight's gradient over a block of tokens.
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
from model1.ops.engram.ref import GATE_SCORE_MIN
from model1.ops.launch import launch_options
from model1.ops.partial_sums import sum_parts, sum_parts_kernel, sum_parts_sizes
from model1.ops.rounding import round_to

_SCORE_MIN = tl.constexpr(GATE_SCORE_MIN)


@dataclass(frozen=True)
class Config:
    """How the work is cut, in this way alone measured. Results do not depend on how many tokens."""

    forward_tokens: int = 2  # of a program, which reads the weights once for all of them
    score_elements: int = 1024  # of the tile of streams and channels that the score is summed in
    # 4 warps of 256: a thread then has the same ones of all rows, and one of them alone is laid
    # out like the others
    channels: int = 1024
    backward_tokens: int = 4  # a step of the second pass
    tokens_per_sum: int = 32  # whose weight gradients one program adds up
    unroll: int = 2  # steps whose loads may be under way at once
    num_warps: int = 4


@triton.jit
def _load(ptr, mask, IS_FULL: tl.constexpr, POLICY: tl.constexpr):
    """In fp32, 0 where mask is false, which is nowhere with IS_FULL."""
    if IS_FULL:
        x = tl.load(ptr, eviction_policy=POLICY)  # pyright: ignore[reportArgumentType]
    else:
        x = tl.load(ptr, mask=mask, other=0.0, eviction_policy=POLICY)  # pyright: ignore
    return x.to(tl.float32)


@triton.jit
def _store(ptr, x, mask, IS_FULL: tl.constexpr, INTERPRETED: tl.constexpr):
    rounded = round_to(x, ptr.dtype.element_ty, INTERPRETED)
    if IS_FULL:
        tl.store(ptr, rounded)
    else:
        tl.store(ptr, rounded, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_gate_fwd_kernel(
    h_ptr, stride_h_t, stride_h_n, key_ptr, stride_key_t, stride_key_n, value_ptr, stride_value_t,
    weight_ptr, live_ptr, out_ptr, gate_ptr, scores_ptr, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, HAS_LIVE: tl.constexpr, SIGNED_SQRT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, UNROLL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    IS_FULL: tl.constexpr = N == BLOCK_N and D % BLOCK_D == 0
    IS_FULL_OUT: tl.constexpr = N == BLOCK_N and D % BLOCK_OUT == 0
    ROOT: tl.constexpr = D**0.5
    first = tl.program_id(0).to(tl.int64) * TOKENS
    stream = tl.arange(0, BLOCK_N).to(tl.int64)
    row, offs_d = stream[:, None], tl.arange(0, BLOCK_D)[None]
    h_row, key_row = h_ptr + row * stride_h_n, key_ptr + row * stride_key_n
    sums = ()
    for _ in tl.static_range(3 * TOKENS):
        sums += (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    for start in tl.range(0, D, BLOCK_D, loop_unroll_factor=UNROLL):
        channel = start + offs_d
        mask = (row < N) & (channel < D)
        # every program reads the weights: they stay near, what passes through once does not
        weight = _load(weight_ptr + row * D + channel, mask, IS_FULL, "evict_last")
        new = ()
        for i in tl.static_range(TOKENS):
            # behind the last token it is read, and its results written, once more
            token = tl.minimum(first + i, num_tokens - 1)
            h = _load(h_row + token * stride_h_t + channel, mask, IS_FULL, "evict_first")
            key = _load(key_row + token * stride_key_t + channel, mask, IS_FULL, "evict_first")
            new += (sums[3 * i] + h * h, sums[3 * i + 1] + key * key)
            new += (sums[3 * i + 2] + h * weight * key,)
        sums = new
    plane = num_tokens.to(tl.int64) * N
    for i in tl.static_range(TOKENS):
        token = tl.minimum(first + i, num_tokens - 1)
        # 1 / rms = sqrt(d) / norm for each side; with the score's 1 / sqrt(d), sqrt(d) remains
        query_scale = tl.rsqrt(tl.sum(sums[3 * i], axis=1) + eps * D)
        key_scale = tl.rsqrt(tl.sum(sums[3 * i + 1], axis=1) + eps * D)
        score = tl.sum(sums[3 * i + 2], axis=1) * query_scale * key_scale * ROOT
        gate = 1.0 / (1.0 + tl.exp(-_signed_root(score, SIGNED_SQRT)))
        if HAS_LIVE:
            gate *= tl.load(live_ptr + token).to(tl.float32)
        at = token * N + stream
        tl.store(gate_ptr + at, gate, mask=stream < N)
        tl.store(scores_ptr + at, score, mask=stream < N)
        tl.store(scores_ptr + plane + at, query_scale, mask=stream < N)
        tl.store(scores_ptr + 2 * plane + at, key_scale, mask=stream < N)
        for start in tl.range(0, D, BLOCK_OUT, loop_unroll_factor=UNROLL):
            channel = start + tl.arange(0, BLOCK_OUT)[None]
            value_at = value_ptr + token * stride_value_t + channel
            value = _load(value_at, channel < D, D % BLOCK_OUT == 0, "evict_first")
            mask = (row < N) & (channel < D)
            out_at = out_ptr + (token * N + row) * D + channel
            _store(out_at, gate[:, None] * value, mask, IS_FULL_OUT, INTERPRETED)


@triton.jit
def _signed_root(score, SIGNED_SQRT: tl.constexpr):
    """What the sigmoid takes: sign(s) sqrt(max(|s|, 1e-6)), or s itself."""
    if not SIGNED_SQRT:
        return score
    size = tl.abs(score)
    # comparisons with NaN are false: it stays
    root = tl.sqrt(tl.where(size < _SCORE_MIN, _SCORE_MIN, size))
    return tl.where(score < 0, -root, tl.where(score == 0, 0.0, root))


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_gate_score_bwd_kernel(
    grad_ptr, value_ptr, stride_value_t, gate_ptr, scores_ptr, d_gate_ptr, d_value_ptr, factors_ptr,
    num_tokens,
    N: tl.constexpr, D: tl.constexpr, HAS_D_GATE: tl.constexpr, SIGNED_SQRT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    IS_FULL: tl.constexpr = N == BLOCK_N and D % BLOCK_D == 0
    ROOT: tl.constexpr = D**0.5
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, BLOCK_N).to(tl.int64)
    row, offs_d = stream[:, None], tl.arange(0, BLOCK_D)[None]
    at, plane = token * N + stream, num_tokens.to(tl.int64) * N
    gate = tl.load(gate_ptr + at, mask=stream < N, other=0.0)
    products = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D, loop_unroll_factor=UNROLL):
        channel = start + offs_d
        mask = (row < N) & (channel < D)
        grad_at = grad_ptr + (token * N + row) * D + channel
        grad = _load(grad_at, mask, IS_FULL, "evict_first")
        value_at = value_ptr + token * stride_value_t + channel
        value = _load(value_at, channel < D, D % BLOCK_D == 0, "evict_first")
        products += grad * value
        d_value = tl.sum(grad * gate[:, None], axis=0)[None]
        d_value_at = d_value_ptr + token * D + channel
        _store(d_value_at, d_value, channel < D, D % BLOCK_D == 0, INTERPRETED)
    d_gate = tl.sum(products, axis=1)
    if HAS_D_GATE:
        d_gate += tl.load(d_gate_ptr + at, mask=stream < N, other=0.0)
    score = tl.load(scores_ptr + at, mask=stream < N, other=0.0)
    query_scale = tl.load(scores_ptr + plane + at, mask=stream < N, other=0.0)
    key_scale = tl.load(scores_ptr + 2 * plane + at, mask=stream < N, other=0.0)
    # sigmoid(-u) and not 1 - gate, which cancels; a token that is not live has gate = 0
    d_score = d_gate * gate / (1.0 + tl.exp(_signed_root(score, SIGNED_SQRT)))
    if SIGNED_SQRT:
        size = tl.abs(score)
        is_flat = size < _SCORE_MIN
        d_score = tl.where(is_flat, 0.0, d_score * 0.5 / tl.sqrt(tl.where(is_flat, 1.0, size)))
    product_factor = d_score * ROOT * query_scale * key_scale
    tl.store(factors_ptr + at, product_factor, mask=stream < N)
    h_factor = d_score * score * query_scale * query_scale
    tl.store(factors_ptr + plane + at, h_factor, mask=stream < N)
    key_factor = d_score * score * key_scale * key_scale
    tl.store(factors_ptr + 2 * plane + at, key_factor, mask=stream < N)


@triton.jit(do_not_specialize=["num_tokens"])
def _engram_gate_row_bwd_kernel(
    h_ptr, stride_h_t, stride_h_n, key_ptr, stride_key_t, stride_key_n, weight_ptr, factors_ptr,
    d_h_ptr, d_key_ptr, partial_ptr, num_tokens,
    N: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # d_h = product_factor w key - h_factor h,   d_key = product_factor w h - key_factor key
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    IS_FULL: tl.constexpr = D % BLOCK_D == 0
    program = tl.program_id(0)
    part, stream = program // (NUM_CHUNKS * N), (program // NUM_CHUNKS % N).to(tl.int64)
    channel = program % NUM_CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)[None]
    weight = _load(weight_ptr + stream * D + channel, channel < D, IS_FULL, "")
    total = tl.zeros((1, BLOCK_D), tl.float32)
    plane = num_tokens.to(tl.int64) * N
    for step in range(0, tl.minimum(num_tokens - part * TOKENS, TOKENS), BLOCK_T):
        tokens = part.to(tl.int64) * TOKENS + step + tl.arange(0, BLOCK_T)
        # one number per row: loaded as a vector, so that a thread loads those of its rows once
        at = factors_ptr + tokens * N + stream
        product_factor = tl.load(at, mask=tokens < num_tokens, other=0.0)[:, None]
        h_factor = tl.load(at + plane, mask=tokens < num_tokens, other=0.0)[:, None]
        key_factor = tl.load(at + 2 * plane, mask=tokens < num_tokens, other=0.0)[:, None]
        token = tokens[:, None]
        is_token = token < num_tokens
        # a last block may have fewer tokens: these masks stay, one per row
        row_mask = is_token if IS_FULL else is_token & (channel < D)
        h_at = h_ptr + token * stride_h_t + stream * stride_h_n + channel
        h = _load(h_at, row_mask, False, "evict_first")
        key_at = key_ptr + token * stride_key_t + stream * stride_key_n + channel
        key = _load(key_at, row_mask, False, "evict_first")
        total += tl.sum(h * product_factor * key, axis=0)[None]
        scaled = product_factor * weight
        at = (token * N + stream) * D + channel
        _store(d_h_ptr + at, scaled * key - h_factor * h, row_mask, False, INTERPRETED)
        _store(d_key_ptr + at, scaled * h - key_factor * key, row_mask, False, INTERPRETED)
    tl.store(partial_ptr + (part.to(tl.int64) * N + stream) * D + channel, total, mask=channel < D)


def engram_gate_triton(
    h: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor, live: Tensor | None,
    eps: float, signed_sqrt: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.engram.ref.engram_gate_ref`."""
    t, n, d = h.shape
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    gate = torch.empty((t, n), dtype=torch.float32, device=h.device)
    scores = torch.empty((3, t, n), dtype=torch.float32, device=h.device)
    if t * n == 0:
        return out, gate, scores
    config, (h, key, value) = config or Config(), map(_rows, (h, key, value))
    kernel: Any = _engram_gate_fwd_kernel
    with torch.cuda.device_of(h):
        kernel[(-(-t // config.forward_tokens),)](
            h, *h.stride()[:2], key, *key.stride()[:2], value, value.stride(0),
            norm_weight.contiguous(), h if live is None else live.contiguous(), out, gate, scores,
            t, eps, HAS_LIVE=live is not None, SIGNED_SQRT=signed_sqrt,
            INTERPRETED=knobs.runtime.interpret, **_forward_sizes(n, d, config),
            **launch_options(config.num_warps, 1),
        )  # fmt: skip
    return out, gate, scores


def engram_gate_backward_triton(
    grad: Tensor, d_gate: Tensor | None, h: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor,
    gate: Tensor, scores: Tensor, signed_sqrt: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.engram.ref.engram_gate_backward_ref`."""
    t, n, d = h.shape
    config, device = config or Config(), h.device
    d_h, d_key, d_value, d_weight = (
        torch.empty(x.shape, dtype=x.dtype, device=device) for x in (h, key, value, norm_weight)
    )
    if h.numel() == 0:
        return d_h, d_key, d_value.zero_(), d_weight.zero_()
    num_parts = -(-t // config.tokens_per_sum)
    factors = torch.empty((3, t, n), dtype=torch.float32, device=device)
    partial = torch.empty((num_parts, n, d), dtype=torch.float32, device=device)
    score, row = _backward_sizes(n, d, config)
    common = {"INTERPRETED": knobs.runtime.interpret, **launch_options(config.num_warps, 1)}
    h, key, value = map(_rows, (h, key, value))
    kernels: tuple[Any, ...] = (_engram_gate_score_bwd_kernel, _engram_gate_row_bwd_kernel)
    with torch.cuda.device_of(h):
        kernels[0][(t,)](
            grad.contiguous(), value, value.stride(0), gate, scores,
            gate if d_gate is None else d_gate.contiguous(), d_value, factors, t,
            HAS_D_GATE=d_gate is not None, SIGNED_SQRT=signed_sqrt, **score, **common,
        )  # fmt: skip
        kernels[1][(num_parts * n * -(-d // row["BLOCK_D"]),)](
            h, *h.stride()[:2], key, *key.stride()[:2], norm_weight.contiguous(), factors,
            d_h, d_key, partial, t, **row, **common,
        )  # fmt: skip
        sum_parts(partial, d_weight)
    return d_h, d_key, d_value, d_weight


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring channels, a copy only where they are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward_sizes(n: int, d: int, config: Config) -> dict[str, Any]:
    block_n, whole = triton.next_power_of_2(n), triton.next_power_of_2(d)
    blocks = {"BLOCK_D": min(whole, max(64, config.score_elements // block_n))}
    blocks |= {"BLOCK_N": block_n, "BLOCK_OUT": min(whole, config.channels)}
    return {"N": n, "D": d, **blocks, "UNROLL": config.unroll, "TOKENS": config.forward_tokens}


def _backward_sizes(n: int, d: int, config: Config) -> tuple[dict[str, Any], ...]:
    """Of the pass to the score and of that to h and key."""
    block_d = min(config.channels, triton.next_power_of_2(d))
    common = {"N": n, "D": d, "BLOCK_D": block_d}
    score = {"BLOCK_N": triton.next_power_of_2(n), "UNROLL": config.unroll}
    rows = {"TOKENS": config.tokens_per_sum, "BLOCK_T": config.backward_tokens}
    return common | score, common | rows


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Four streams of 4096 channels, keys and value from one projection."""
    n, d, config = 4, 4096, Config()
    score, row = _backward_sizes(n, d, config)
    strides = {
        "stride_h_t": n * d, "stride_h_n": d, "stride_key_t": (n + 1) * d, "stride_key_n": d,
        "stride_value_t": (n + 1) * d,
    }  # fmt: skip
    flags = {
        "HAS_LIVE": False, "HAS_D_GATE": False, "SIGNED_SQRT": True, "INTERPRETED": False,
    }  # fmt: skip
    cases = []
    for kernel, name, sizes in (
        (_engram_gate_fwd_kernel, "forward", _forward_sizes(n, d, config)),
        (_engram_gate_score_bwd_kernel, "backward, score", score),
        (_engram_gate_row_bwd_kernel, "backward, rows", row),
        (sum_parts_kernel, "backward, weight", sum_parts_sizes()),
    ):
        constants = {
            x: value for x, value in (strides | flags | sizes).items() if x in kernel.arg_names
        }
        half = dict.fromkeys(("h_ptr", "key_ptr", "value_ptr", "grad_ptr", "out_ptr"), "*bf16")
        half |= dict.fromkeys(("d_h_ptr", "d_key_ptr", "d_value_ptr"), "*bf16")
        single = ("weight_ptr", "gate_ptr", "scores_ptr", "d_gate_ptr", "factors_ptr")
        others = dict.fromkeys((*single, "partial_ptr", "total_ptr"), "*fp32")
        others |= {"live_ptr": "*i1", "eps": "fp32"}
        others |= dict.fromkeys(("num_tokens", "num_parts", "size"), "i32")
        cases.append(
            CompileCase(
                name=f"engram_gate {name}",
                kernel=kernel,
                signature=half | others | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                num_warps=config.num_warps,
                num_stages=1,
            )
        )
    return cases

"""Which calls the Hopper kernel takes, and for which of them it is the faster one."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout

_FP8 = (KVLayout("model1_fp8", d_nope=448, d_rope=64), KVLayout("v32_fp8", d_nope=512, d_rope=64))
_CHANNELS = (512, 576)
_VALUE_DIM = 512
_HEADS = 64  # of a program
_UNIT_BYTES = 16  # what blocks and rows must start at multiples of


def hopper_call_refusal(
    q: Tensor, kv_cache: Tensor, cu_seqlens_q: Tensor | None, layout: KVLayout | None,
    value_dim: int, softmax_scale: float, causal: bool,
) -> str | None:  # fmt: skip
    """Why the Hopper kernel cannot take such a call, or None if it can."""
    d = q.shape[-1]
    if q.dtype != torch.bfloat16:
        return f"takes bfloat16 queries, got {q.dtype}"
    if cu_seqlens_q is not None:
        return "takes as many queries of each request, got cu_seqlens_q"
    if d not in _CHANNELS or value_dim != _VALUE_DIM:
        return f"takes rows of 512 or 576 channels with 512 of values, got {d} with {value_dim}"
    if not softmax_scale > 0:  # what it hides is -inf before the scale
        return f"takes a softmax_scale above 0, got {softmax_scale}"
    if causal and q.shape[1] > 1 and q.shape[2] % _HEADS:
        return f"takes multiples of 64 heads if causal with several queries, got {q.shape[2]}"
    return _cache_refusal(kv_cache, layout, d)


def _cache_refusal(kv_cache: Tensor, layout: KVLayout | None, d: int) -> str | None:
    if layout is None:
        if kv_cache.shape[2] != 1 or kv_cache.stride(1) != d:
            got = f"{kv_cache.shape[2]}, {kv_cache.stride(1)} elements apart"
            return f"takes one key head with tokens {d} elements apart, got {got}"
    elif layout.name != "bf16" and layout not in _FP8:
        got = f"{layout.name} {layout.d_nope} + {layout.d_rope}"
        return f"takes bf16, model1_fp8 448 + 64 or v32_fp8 512 + 64, got {got}"
    # a graph that is traced cannot ask where a tensor starts; the launch asks again
    start = 0 if torch.compiler.is_compiling() else kv_cache.data_ptr()
    step = kv_cache.stride(0) * kv_cache.element_size()
    if start % _UNIT_BYTES or step % _UNIT_BYTES:
        return f"takes blocks that start at multiples of 16 bytes, got {start % 16} + n * {step}"
    return None


# Where it was seen to win, on an H200, 2026-12-01, by requests times groups of 64 of all their
# heads: from 8 on with 32, 64 and 128 heads over bf16 rows, in 0.67 to 0.96 of the portable
# kernel's time, and at 64 and 128 with 16, 64 and 128 heads over FP8 rows, in 0.74 to 0.79. With 1
# and 2 it took 0.90 to 1.40 of it, with 16 heads over bf16 rows 0.99 to 1.63.
_BF16_MIN_HEADS, _BF16_MIN_PARTS = 32, 8
_FP8_MIN_HEADS, _FP8_MIN_PARTS = 16, 64


def hopper_wins(b: int, s_q: int, h: int, is_fp8: bool) -> bool:
    """Whether it is the faster kernel for b requests with s_q queries of h heads."""
    parts = b * -(-s_q * h // _HEADS)
    if is_fp8:
        return h >= _FP8_MIN_HEADS and parts >= _FP8_MIN_PARTS
    return h >= _BF16_MIN_HEADS and parts >= _BF16_MIN_PARTS


def choose_backend(
    operator: Operator, backend: str, q: Tensor, kv_cache: Tensor, cu_seqlens_q: Tensor | None,
    layout: KVLayout | None, value_dim: int, softmax_scale: float, causal: bool,
    deterministic: bool,
) -> str:  # fmt: skip
    """What `resolve` says, and under "auto" `hopper` where that is the faster kernel."""
    if not q.is_cuda:  # where steps are small, and counted
        return operator.resolve(backend, q.device)
    refusal = hopper_call_refusal(
        q, kv_cache, cu_seqlens_q, layout, value_dim, softmax_scale, causal
    )
    # a deterministic row must not learn from the choice how many others there are
    # and of a plain cache a graph that is traced cannot know where it starts
    is_known = layout is not None or not torch.compiler.is_compiling()
    wins = False
    if is_known and not deterministic and refusal is None:
        is_fp8 = layout is not None and layout.is_fp8
        wins = hopper_wins(q.shape[0], q.shape[1], q.shape[2], is_fp8)
    return operator.resolve_call(backend, q.device, refusal, wins)

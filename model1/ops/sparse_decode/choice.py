"""Which calls the Hopper kernel takes, and for which of them it is the faster one."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout

MODEL1 = KVLayout("model1_fp8", d_nope=448, d_rope=64)
V32 = KVLayout("v32_fp8", d_nope=512, d_rope=64)
_BF16_CHANNELS = (512, 576)
_VALUE_DIM = 512
_HEADS = 64  # of a program

# Where it was seen to win, on an H200, 2026-12-01: MODEL1's rows with lists of 640 to 16,384 slots,
# V3.2's with 2,048 and 16,384, 8 to 128 heads, 96 and more programs of 64 heads, in 0.41 to 0.85
# of the portable kernel's time. With 64 programs it took 1.08 and 1.20 of it, with 8 to 1.79, over
# bf16 rows with 64 programs 1.08.
_MIN_PROGRAMS = 96
_HEAD_COUNTS = range(8, 129)
_MIN_ENTRIES = 640


def hopper_call_refusal(
    layout: KVLayout, dtype: torch.dtype, value_dim: int, softmax_scale: float
) -> str | None:
    """Why the Hopper kernel cannot take such a call, or None if it can."""
    is_bf16 = layout.name == "bf16" and layout.d in _BF16_CHANNELS
    if layout not in (MODEL1, V32) and not is_bf16:
        return (
            "takes model1_fp8 rows of 448 + 64 channels, v32_fp8 of 512 + 64 or bf16 of 512 or "
            f"576, got {layout.name} {layout.d_nope} + {layout.d_rope}"
        )
    if dtype != torch.bfloat16:
        return f"takes bfloat16 queries, got {dtype}"
    if value_dim != _VALUE_DIM:
        return f"gives values of {_VALUE_DIM} channels, value_dim is {value_dim}"
    if not softmax_scale > 0:  # what it hides is -inf before the scale
        return f"takes a softmax_scale above 0, got {softmax_scale}"
    return None


def hopper_wins(layout: KVLayout, rows: int, h: int, entries: int) -> bool:
    """Whether it is the faster kernel for `rows` queries of h heads over lists of `entries`."""
    programs = rows * -(-h // _HEADS)
    is_wide = programs >= _MIN_PROGRAMS and h in _HEAD_COUNTS
    return layout in (MODEL1, V32) and is_wide and entries >= _MIN_ENTRIES


def choose_backend(
    operator: Operator, backend: str, q: Tensor, topk_indices: Tensor,
    extra_topk_indices: Tensor | None, layout: KVLayout, value_dim: int,
    softmax_scale: float, deterministic: bool,
) -> str:  # fmt: skip
    """What `resolve` says, and under "auto" `hopper` where that is the faster kernel."""
    refusal = hopper_call_refusal(layout, q.dtype, value_dim, softmax_scale)
    entries = topk_indices.shape[-1]
    entries += 0 if extra_topk_indices is None else extra_topk_indices.shape[-1]
    wins = hopper_wins(layout, q.shape[0] * q.shape[1], q.shape[2], entries)
    # a deterministic row must not learn from the choice how many others there are
    return operator.resolve_call(backend, q.device, refusal, wins and not deterministic)

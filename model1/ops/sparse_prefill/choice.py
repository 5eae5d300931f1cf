"""Which calls the Hopper kernel takes, and for which of them it is the faster one."""

from __future__ import annotations

import torch

_CHANNELS = (512, 576)
_VALUE_DIM = 512


def hopper_call_refusal(
    dtype: torch.dtype, d: int, value_dim: int, softmax_scale: float
) -> str | None:
    """Why the Hopper kernel cannot take such a call, or None if it can."""
    if dtype != torch.bfloat16:
        return f"takes bfloat16, got {dtype}"
    if d not in _CHANNELS or value_dim != _VALUE_DIM:
        return f"takes rows of 512 or 576 channels with 512 of values, got {d} with {value_dim}"
    if not softmax_scale > 0:  # what it hides is -inf before the scale
        return f"takes a softmax_scale above 0, got {softmax_scale}"
    return None


def hopper_wins(rows: int, h: int, topk: int) -> bool:
    """Whether it is the faster kernel for `rows` queries of h heads over lists of `topk`."""
    return False

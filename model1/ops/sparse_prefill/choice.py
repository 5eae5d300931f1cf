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


# Where it was seen to win, on an H200, 2026-12-01: 32, 64 and 128 heads, lists of 64 to 2,048
# entries, 1 to 4,096 queries, in 0.52 to 0.71 of the portable kernel's time. With 16 heads, 512 of
# a row's channels, 0.77 to 0.95 of it.
_MIN_HEADS = {512: 16, 576: 32}


def hopper_wins(h: int, d: int) -> bool:
    """Whether it is the faster kernel for h heads of d channels, however many queries there are."""
    return d in _MIN_HEADS and h >= _MIN_HEADS[d]


# Its backward, on an H200, 2026-12-01: 64 and 128 heads, 4,096 queries with lists of 2,048 of 8,192
# keys, in 0.77 to 0.79 of the portable kernel's time with rows of 512 channels, in 0.38 of it with
# 576. Fewer heads and deterministic calls are not measured.
_MIN_BACKWARD_HEADS = 64


def hopper_backward_wins(h: int, deterministic: bool) -> bool:
    """Whether its backward is the faster one for queries of h heads, however many there are."""
    return h >= _MIN_BACKWARD_HEADS and not deterministic

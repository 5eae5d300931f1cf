"""Angles of rotary position embedding, and YaRN frequencies."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles of t positions, each pair's value stored twice so that no reshape is needed."""

    cos: Tensor  # [t, d_rope] fp32
    sin: Tensor  # [t, d_rope] fp32, negated on the first element of each pair


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """Angular frequency of each of the dim/2 pairs, in fp64: theta ** (-2 i / dim)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def yarn_frequencies(
    frequencies: Tensor, *, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """Slow pairs are interpolated by `factor`, fast ones kept, a linear ramp between.

    A pair turns r = original_length * f / (2 pi) times over the original context;
    r >= beta_fast keeps f, r <= beta_slow gives f / factor.
    frequencies: [d_rope / 2] fp64 as of `rope_frequencies`, empty allowed; the result is like it.
    beta_fast must exceed beta_slow. Source: arXiv 2309.00071, section 3.2.
    """
    rotations = original_length * frequencies / (2 * math.pi)
    keep = ((rotations - beta_slow) / (beta_fast - beta_slow)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / factor


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Angles of integer `positions` [t]; fp64 inside, because position * frequency grows large."""
    angles = positions.to(torch.float64)[:, None] * frequencies[None, :]
    cos = angles.cos().repeat_interleave(2, dim=-1)
    sin = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
    return Rotation(cos.float(), sin.float())

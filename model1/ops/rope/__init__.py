"""Rotary position embedding on adjacent pairs, its inverse, and YaRN frequencies.

Pairs are interleaved (0,1), (2,3), ...: the layout of MLA and MODEL1 (V3.2's indexer differs).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.ragged import counts_calls


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


def apply_rope(
    x: Tensor, angles: Rotation, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotate [t, d_rope] or [t, h, d_rope] by the angle of each position; `inverse` turns back.

    Computed in fp32, returned in the dtype of x; or written to `out`, fp32 like x, x itself too.
    """
    cos, sin = angles
    shape = x.shape
    if len(shape) == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x32 = x.float()
    swapped = x32.view(*shape[:-1], shape[-1] // 2, 2).flip(-1).view(shape)
    turned = torch.addcmul(x32 * cos, swapped, sin, value=-1.0 if inverse else 1.0, out=out)
    return turned.type_as(x)


def rotate_tail(x: Tensor, angles: Rotation, *, inverse: bool = False) -> Tensor:
    """x [t, d] or [t, h, d] with its last d_rope channels rotated as `apply_rope` does.

    The caller gives x up: where no gradient is recorded, its memory may hold the result.
    """
    d_rope = angles.cos.shape[-1]
    plain, rotary = x.split_with_sizes((x.shape[-1] - d_rope, d_rope), dim=-1)
    if x.dtype == torch.float32 and counts_calls(x):
        apply_rope(rotary, angles, inverse=inverse, out=rotary)
        return x
    return torch.cat((plain, apply_rope(rotary, angles, inverse=inverse)), dim=-1)

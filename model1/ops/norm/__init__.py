"""Root-mean-square normalisation."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.ragged import counts_calls


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x**2, last axis) + eps) * weight, in the dtype of x; weight None means 1.

    x: [..., c] floating point, 16 bits computed in fp32 and rounded once; leading axes may be
    empty. weight: [c] of any floating dtype, rounded to that of x first. A NaN makes its row NaN,
    an infinity itself NaN and the rest of its row 0. Differentiable. Source: arXiv 1910.07467.
    """
    if x.dtype == torch.float32 and counts_calls(x):
        # Half the time of F.rms_norm, which PyTorch composes of more calls.
        out = _over_rms_few(x, x, eps)
        return out if weight is None else out.mul_(weight.type_as(x))
    weight = None if weight is None else weight.to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def over_rms(y: Tensor, x: Tensor, eps: float) -> Tensor:
    """y / sqrt(mean(x**2, last axis) + eps), y [..., m] and x [..., c] in fp32."""
    if counts_calls(x):
        return _over_rms_few(y, x, eps)
    return y * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _over_rms_few(y: Tensor, x: Tensor, eps: float) -> Tensor:
    """`over_rms` as sqrt(c) y / sqrt(norm(x)**2 + eps c), which takes the fewest calls."""
    width = x.shape[-1]
    zero, floor = _constants(eps * width)
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)
    return torch.addcdiv(zero, y, root, value=math.sqrt(width))


@functools.cache
def _constants(floor: float) -> tuple[Tensor, Tensor]:
    # said, not ambient: they outlive the caller's default type and device
    options = {"dtype": torch.float32, "device": "cpu"}
    return torch.zeros((), **options), torch.tensor(math.sqrt(floor), **options)

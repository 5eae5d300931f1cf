"""Plain PyTorch for root-mean-square normalisation."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.ragged import counts_calls


def rms_norm_ref(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised x + residual, and that sum; see `model1.ops.norm.add_rms_norm`."""
    total = x if residual is None else x + residual
    return normalise(total, weight, eps), total


def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `model1.ops.norm.rms_norm`."""
    if x.dtype == torch.float32 and counts_calls(x):
        # Half the time of F.rms_norm, which PyTorch composes of more calls.
        out = _over_rms_few(x, x, eps)
        return out if weight is None else out.mul_(weight.type_as(x))
    weight = None if weight is None else weight.to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_backward_ref(
    grad: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum `total` and of weight; the latter is empty without a weight.

    With y = total / rms and g = grad weight:  d = (g - y mean(g y)) / rms + d_total
    """
    wide, g = total.float(), grad.float()
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = wide * rstd
    d_weight = total.new_empty(0)
    if weight is not None:
        d_weight = (g * y).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * weight.to(total.dtype).float()
    d_x = (g - y * (g * y).mean(dim=-1, keepdim=True)) * rstd
    if d_total is not None:
        d_x = d_x + d_total.float()
    return d_x.type_as(total), d_weight


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

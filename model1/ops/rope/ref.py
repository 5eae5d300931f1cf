"""Plain PyTorch for rotary position embedding and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.norm.ref import normalise
from model1.ops.ragged import counts_calls
from model1.ops.rope.angles import Rotation


def turn(
    x: Tensor, rotation: Rotation, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """See `model1.ops.rope.apply_rope`; written to `out`, fp32 like x, x itself too."""
    cos, sin = rotation
    shape = x.shape
    if len(shape) == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x32 = x.float()
    swapped = x32.view(*shape[:-1], shape[-1] // 2, 2).flip(-1).view(shape)
    turned = torch.addcmul(x32 * cos, swapped, sin, value=-1.0 if inverse else 1.0, out=out)
    return turned.type_as(x)


def rotate_tail_ref(
    x: Tensor, rotation: Rotation, *, inverse: bool = False, norm_eps: float | None = None
) -> Tensor:
    """See `model1.ops.rope.rotate_tail` and, with norm_eps, `model1.ops.rope.norm_rotate_tail`."""
    if norm_eps is not None:
        x = normalise(x, None, norm_eps)
    d_rope = rotation.cos.shape[-1]
    plain, rotary = x.split_with_sizes((x.shape[-1] - d_rope, d_rope), dim=-1)
    if x.dtype == torch.float32 and counts_calls(x):
        turn(rotary, rotation, inverse=inverse, out=rotary)
        return x
    return torch.cat((plain, turn(rotary, rotation, inverse=inverse)), dim=-1)


def norm_rotate_tail_backward_ref(
    grad: Tensor, x: Tensor, rotation: Rotation, *, inverse: bool, norm_eps: float
) -> Tensor:
    """Gradient of x: with y = x / rms and g = grad turned back, (g - y mean(g y)) / rms."""
    g = rotate_tail_ref(grad.float().clone(), rotation, inverse=not inverse)
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm_eps)
    y = wide * rstd
    return ((g - y * (g * y).mean(dim=-1, keepdim=True)) * rstd).type_as(x)

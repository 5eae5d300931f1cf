"""Plain PyTorch for SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor | None, limit: float | None) -> Tensor:
    """See `model1.ops.activation.swiglu`; up None: gate holds both, side by side."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up


def swiglu_backward_ref(
    grad: Tensor, gate: Tensor, up: Tensor | None, limit: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; without up that of both in one tensor, and an empty one."""
    if up is None:
        first, second = gate.chunk(2, dim=-1)
        d_gate, d_up = swiglu_backward_ref(grad, first, second, limit)
        return torch.cat((d_gate, d_up), dim=-1), gate.new_empty(0)
    wide = grad.float()
    g, u = gate.float(), up.float()
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(min=-limit, max=limit)
    s = torch.sigmoid(g)
    d_gate, d_up = wide * u * s * (1 + g * (1 - s)), wide * g * s
    if limit is not None:  # as PyTorch's clamp: the bounds themselves pass, NaN does not
        d_gate = torch.where(gate <= limit, d_gate, 0.0)
        d_up = torch.where((up >= -limit) & (up <= limit), d_up, 0.0)
    return d_gate.type_as(gate), d_up.type_as(up)

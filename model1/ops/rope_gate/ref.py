"""Plain PyTorch for the end of attention: inverse rotation, then the gate."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.rope import Rotation, apply_rope


def inverse_rope_gate_ref(out: Tensor, rotation: Rotation | None, gate: Tensor | None) -> Tensor:
    """See `model1.ops.rope_gate.inverse_rope_gate`."""
    turned = out if rotation is None else _rotate_tail(out, rotation, inverse=True)
    return turned if gate is None else _scale(turned, gate)


def inverse_rope_gate_backward_ref(
    grad: Tensor, out: Tensor, rotation: Rotation | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of out and gate; the latter is empty without a gate."""
    turned = grad if rotation is None else _rotate_tail(grad, rotation, inverse=False)
    if gate is None:
        return turned, out.new_empty(0)
    return _scale(turned, gate), (turned.float() * out.float()).sum(-1).to(gate.dtype)


def _rotate_tail(x: Tensor, rotation: Rotation, *, inverse: bool) -> Tensor:
    d_rope = rotation.cos.shape[-1]
    plain, rope = x.split([x.shape[-1] - d_rope, d_rope], dim=-1)
    return torch.cat([plain, apply_rope(rope, rotation, inverse=inverse)], dim=-1)


def _scale(x: Tensor, gate: Tensor) -> Tensor:
    return (x.float() * gate.float()[..., None]).to(x.dtype)

"""Plain PyTorch for the end of attention: inverse rotation, then the gate."""

from __future__ import annotations

from torch import Tensor

from model1.ops.rope.angles import Rotation
from model1.ops.rope.ref import rotate_tail_ref


def inverse_rope_gate_ref(out: Tensor, rotation: Rotation | None, gate: Tensor | None) -> Tensor:
    """See `model1.ops.rope_gate.inverse_rope_gate`."""
    scaled = out.clone() if gate is None else _scale(out, gate)
    return scaled if rotation is None else rotate_tail_ref(scaled, rotation, inverse=True)


def inverse_rope_gate_backward_ref(
    grad: Tensor, out: Tensor, rotation: Rotation | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of out and gate; the latter is empty without a gate."""
    turned = grad if rotation is None else rotate_tail_ref(grad.clone(), rotation)
    if gate is None:
        return turned, out.new_empty(0)
    return _scale(turned, gate), (turned.float() * out.float()).sum(-1).to(gate.dtype)


def _scale(x: Tensor, gate: Tensor) -> Tensor:
    return (x.float() * gate.float().unsqueeze(-1)).type_as(x)

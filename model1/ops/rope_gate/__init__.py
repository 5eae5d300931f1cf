"""The end of attention: values turned back to relative positions and scaled per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly
from model1.ops.rope import Rotation
from model1.ops.rope_gate.checks import check_arguments


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.rope_gate.ref:{name}_ref",
            "triton": f"model1.ops.rope_gate.portable:{name}_triton",
        },
    )


INVERSE_ROPE_GATE = _operator("inverse_rope_gate")
INVERSE_ROPE_GATE_BACKWARD = _operator("inverse_rope_gate_backward")


def inverse_rope_gate(
    out: Tensor,
    rotation: Rotation | None,
    gate: Tensor | None,
    *,
    d_rope: int,
    is_checked: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Turn the last d_rope channels of attended values back and multiply by the heads' gates.

    result[t, h] = gate[t, h] * concat(out[t, h, :-d_rope], R(t)^-1 out[t, h, -d_rope:])

    out: [t, h, dv] bf16, fp16 or fp32 with a contiguous last axis. rotation: cos, sin [t, d_rope]
    fp32, None = no turning (d_rope then says nothing). gate: [t, h] floating point, None = 1.
    Returns a new tensor like out, or out itself if neither is given; computed in fp32. t = 0 and
    h = 0 are allowed, NaN passes through. Differentiable in out and gate, once.
    is_checked: the caller vouches for the arguments, which are not looked at then.
    Raises ValueError for shapes, dtypes, devices and strides, BackendUnavailable for a backend
    that cannot run here.
    Source: rotary values of DeepSeek-V4 (arXiv 2606.19348), headwise gate of arXiv 2505.06708.
    """
    if not is_checked:
        check_arguments(out, rotation, gate, d_rope)
    if rotation is None and gate is None:
        return out
    cos, sin = (None, None) if rotation is None else rotation
    name = INVERSE_ROPE_GATE.resolve(backend, out.device)
    if calls_ref_directly(name):
        return INVERSE_ROPE_GATE.load(name)(out, rotation, gate)
    return torch.ops.model1.inverse_rope_gate(out, cos, sin, gate, name)


@torch.library.custom_op("model1::inverse_rope_gate", mutates_args=())
def _inverse_rope_gate(
    out: Tensor, cos: Tensor | None, sin: Tensor | None, gate: Tensor | None, backend: str
) -> Tensor:
    return INVERSE_ROPE_GATE.load(backend)(out, _rotation(cos, sin), gate)


@torch.library.custom_op("model1::inverse_rope_gate_backward", mutates_args=())
def _inverse_rope_gate_backward(
    grad: Tensor,
    out: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    gate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = INVERSE_ROPE_GATE_BACKWARD.load(backend)
    return run(grad.contiguous(), out, _rotation(cos, sin), gate)


@_inverse_rope_gate.register_fake
def _(out: Tensor, *args: object) -> Tensor:
    return out.new_empty(out.shape)


@_inverse_rope_gate_backward.register_fake
def _(grad: Tensor, out: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    gate = args[2]
    return out.new_empty(out.shape), out.new_empty(0) if gate is None else torch.empty_like(gate)


def _rotation(cos: Tensor | None, sin: Tensor | None) -> Rotation | None:
    return None if cos is None or sin is None else Rotation(cos, sin)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    out, cos, sin, gate, ctx.backend = inputs
    ctx.save_for_backward(out, cos, sin, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, cos, sin, gate = ctx.saved_tensors
    d_out, d_gate = torch.ops.model1.inverse_rope_gate_backward(
        grad, out, cos, sin, gate, ctx.backend
    )
    return d_out, None, None, None if gate is None else d_gate, None


_inverse_rope_gate.register_autograd(_backward, setup_context=_setup_context)

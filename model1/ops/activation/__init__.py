"""Gated activations of the feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.activation.ref import swiglu_ref
from model1.ops.backend import KERNEL_DTYPES, Operator, calls_ref_directly, unless_fused


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.activation.ref:{name}_ref",
            "triton": f"model1.ops.activation.portable:{name}_triton",
        },
    )


SWIGLU = _operator("swiglu")
SWIGLU_BACKWARD = _operator("swiglu_backward")


def swiglu(
    gate: Tensor, up: Tensor | None, limit: float | None, *, backend: str = "auto"
) -> Tensor:
    """silu(gate) * up; with a limit, gate is clamped from above and up on both sides first.

    gate, up: [..., m], the same shape and floating dtype, which the result has; empty included. up
    None: gate is [..., 2m] and holds both, gate first, and so does its gradient: nothing is copied.
    limit: None or positive. NaN stays NaN. Differentiable, with kernels once; no gradient passes
    where a clamp acts. The reference rounds each step to the dtype, kernels compute in fp32 and
    round once; they take bf16, fp16 and fp32 and run in rows of any stride.
    "auto" is the reference under torch.compile, which fuses it. Raises ValueError for shapes,
    dtypes and devices (on a CPU not where no gradient is recorded), BackendUnavailable for a
    backend that cannot run here.
    Source: arXiv 2002.05202; of the clamps DeepSeek-V4 (arXiv 2606.19348), `swiglu_limit`.
    """
    name = SWIGLU.resolve(unless_fused(backend, gate), gate.device)
    if calls_ref_directly(name):
        return swiglu_ref(gate, up, limit)
    _check(gate, up, limit)
    if name == "ref":
        return swiglu_ref(gate, up, limit)
    if name == "triton" and gate.dtype not in KERNEL_DTYPES:
        raise ValueError(f"gate must be bfloat16, float16 or float32 for triton, got {gate.dtype}")
    return torch.ops.model1.swiglu(gate, up, limit, name)


def _check(gate: Tensor, up: Tensor | None, limit: float | None) -> None:
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive or None, got {limit}")
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ValueError(
            f"gate must be [..., m] floating point, got {list(gate.shape)} {gate.dtype}"
        )
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate without up must be [..., 2m], got {list(gate.shape)}")
        return
    if up.shape != gate.shape or up.dtype != gate.dtype:
        rule = f"{list(gate.shape)} {gate.dtype}"
        raise ValueError(f"up must be {rule} like gate, got {list(up.shape)} {up.dtype}")
    if up.device != gate.device:
        raise ValueError(f"up must be on gate's device {gate.device}, got {up.device}")


@torch.library.custom_op("model1::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor | None, limit: float | None, backend: str) -> Tensor:
    return SWIGLU.load(backend)(gate, up, limit)


@torch.library.custom_op("model1::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, limit: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    return SWIGLU_BACKWARD.load(backend)(grad, gate, up, limit)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor | None, limit: float | None, backend: str) -> Tensor:
    m = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    return gate.new_empty((*gate.shape[:-1], m))


@_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (0,) if up is None else up.shape
    return gate.new_empty(gate.shape), gate.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.limit, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    run = torch.ops.model1.swiglu_backward
    d_gate, d_up = run(grad, gate, up, ctx.limit, ctx.backend)
    return d_gate, None if up is None else d_up, None, None


_swiglu.register_autograd(_backward, setup_context=_setup_context)

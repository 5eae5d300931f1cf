"""Engram's gate: how much of the memory each residual stream of a token takes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.engram.checks import check_eps, check_for_kernel, check_shape
from model1.ops.engram.ref import gate_steps_ref


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.engram.ref:{name}_ref",
            "triton": f"model1.ops.engram.portable:{name}_triton",
        },
    )


ENGRAM_GATE = _operator("engram_gate")
ENGRAM_GATE_BACKWARD = _operator("engram_gate_backward")


def engram_gate(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    live: Tensor | None = None,
    signed_sqrt: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Weigh the memory by how well its key fits each residual stream; (out, gate).

    s = <RMSNorm(h) * norm_weight, RMSNorm(key)> / sqrt(d);   u = sign(s) sqrt(max(|s|, 1e-6))
    gate = sigmoid(u);   out = gate * value      (u = s without signed_sqrt)

    h, key: [t, n, d]. value: [t, d], shared by the streams. norm_weight: [n, d], the product of
    the query's and the key's norm weights. live: [t] bool, gate 0 where false; None = all live.
    out is [t, n, d] in h's dtype; gate is [t, n] in fp32 (fp64 if h is), as is all arithmetic.
    Kernels compute in fp32: with an fp64 h, "auto" is the reference and "triton" a ValueError.
    Differentiable in h, key, value and norm_weight; no gradient passes s where |s| < 1e-6. That of
    norm_weight is added up in a fixed order: the same bits in every run.
    Raises ValueError for shapes and dtypes, BackendUnavailable for a backend that cannot run here.
    Source: arXiv 2601.07372, section 2.3; the signed root is that of the released code.
    """
    if h.ndim != 3:
        raise ValueError(f"h must be [t, n, d], got shape {tuple(h.shape)}")
    num_tokens, num_streams, dim = h.shape
    check_shape("key", key, (num_tokens, num_streams, dim))
    check_shape("value", value, (num_tokens, dim))
    check_shape("norm_weight", norm_weight, (num_streams, dim))
    check_eps(eps)
    if live is not None:
        check_shape("live", live, (num_tokens,))
        if live.dtype != torch.bool:
            raise ValueError(f"live must be bool, got {live.dtype}")
    is_wide = h.dtype == torch.float64
    name = ENGRAM_GATE.resolve("ref" if is_wide and backend == "auto" else backend, h.device)
    if name == "ref":  # PyTorch differentiates and traces it, fp64 and twice included
        return gate_steps_ref(h, key, value, norm_weight, live, eps, signed_sqrt)[:2]
    if is_wide:
        raise ValueError(f"h must be bfloat16, float16 or float32 for {name}, got {h.dtype}")
    check_for_kernel(h.device, is_floating=True, h=h, key=key, value=value, norm_weight=norm_weight)
    check_for_kernel(h.device, is_floating=False, live=live)
    return torch.ops.model1.engram_gate(
        h, key, value, norm_weight, live, eps, signed_sqrt, name
    )[:2]  # fmt: skip


@torch.library.custom_op("model1::engram_gate", mutates_args=())
def _engram_gate(
    h: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor, live: Tensor | None,
    eps: float, signed_sqrt: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return ENGRAM_GATE.load(backend)(h, key, value, norm_weight, live, eps, signed_sqrt)


@torch.library.custom_op("model1::engram_gate_backward", mutates_args=())
def _engram_gate_backward(
    grad: Tensor, d_gate: Tensor | None, h: Tensor, key: Tensor, value: Tensor,
    norm_weight: Tensor, gate: Tensor, scores: Tensor, signed_sqrt: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run = ENGRAM_GATE_BACKWARD.load(backend)
    return run(grad, d_gate, h, key, value, norm_weight, gate, scores, signed_sqrt)


@_engram_gate.register_fake
def _(h: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    t, n, _ = h.shape
    numbers = h.new_empty((t, n), dtype=torch.float32)
    return h.new_empty(h.shape), numbers, h.new_empty((3, t, n), dtype=torch.float32)


@_engram_gate_backward.register_fake
def _(
    grad: Tensor, d_gate: Tensor | None, h: Tensor, key: Tensor, value: Tensor,
    norm_weight: Tensor, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (h, key, value, norm_weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, key, value, norm_weight, _, _, ctx.signed_sqrt, ctx.backend = inputs
    _, gate, scores = output
    ctx.save_for_backward(h, key, value, norm_weight, gate, scores)
    ctx.set_materialize_grads(False)  # few ask for the gate's


def _backward(
    ctx: Any, grad: Tensor | None, d_gate: Tensor | None, d_scores: None
) -> tuple[Tensor | None, ...]:
    h, *others = ctx.saved_tensors
    grad = torch.zeros_like(h) if grad is None else grad
    gradients = torch.ops.model1.engram_gate_backward(
        grad, d_gate, h, *others, ctx.signed_sqrt, ctx.backend
    )
    return *gradients, None, None, None, None


_engram_gate.register_autograd(_backward, setup_context=_setup_context)

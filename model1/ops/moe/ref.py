"""Plain PyTorch mixture of experts: routing and a loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.activation import swiglu


def moe_route_ref(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.moe.moe_route`."""
    # In fp32 softplus is 0 for logits under -100, where the root has no finite slope.
    affinity = F.softplus(logits.float()).clamp(min=1e-30).sqrt()
    scores = affinity.detach() + balance_bias
    # of equal scores the lower expert, which `topk` does not promise
    expert_ids = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    weights = affinity.gather(-1, expert_ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scaling, expert_ids


def moe_route_backward_ref(
    grad: Tensor, weights: Tensor, expert_ids: Tensor, logits: Tensor, *, scaling: float
) -> Tensor:
    """The gradient of the logits; weights are those that the choice returned."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        affinity = F.softplus(logits.float()).clamp(min=1e-30).sqrt().gather(-1, expert_ids)
        again = scaling * affinity / affinity.sum(dim=-1, keepdim=True)
        (d_logits,) = torch.autograd.grad(again, logits, grad)
    return d_logits


def moe_experts_ref(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    swiglu_limit: float | None,
) -> Tensor:
    """See `model1.ops.moe.moe_experts`."""
    out = torch.zeros_like(x)
    for expert_id in range(gate_up.shape[0]):
        rows, choice = torch.where(expert_ids == expert_id)
        if rows.numel() == 0:
            continue
        gate, up = F.linear(x[rows], gate_up[expert_id].to(x.dtype)).chunk(2, dim=-1)
        y = F.linear(swiglu(gate, up, swiglu_limit), down[expert_id].to(x.dtype))
        out = out.index_add(0, rows, y * weights[rows, choice, None].to(x.dtype))
    return out


def moe_experts_backward_ref(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    swiglu_limit: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down; zero for experts without tokens."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in (x, weights, gate_up, down)]
        x, weights, gate_up, down = leaves
        out = moe_experts_ref(x, weights, expert_ids, gate_up, down, swiglu_limit=swiglu_limit)
        if not out.requires_grad:  # nobody chose anything
            return tuple(torch.zeros_like(v) for v in leaves)  # pyright: ignore
        d_x, d_weights, d_gate_up, d_down = torch.autograd.grad(
            out, leaves, grad, allow_unused=True, materialize_grads=True
        )
    return d_x, d_weights, d_gate_up, d_down

"""Plain PyTorch mixture of experts: routing and a loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.activation.ref import swiglu_ref
from model1.ops.fp8_linear.ref import fp8_matmul_ref, fp8_quantize_ref


def moe_route_ref(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.moe.moe_route`."""
    # In fp32 softplus is 0 for logits under -100, where the root has no finite slope.
    affinity = F.softplus(logits.float()).clamp(min=1e-30).sqrt()
    scores = affinity.detach() + balance_bias
    # of equal scores the lower expert, which `topk` does not promise
    best = scores.sort(dim=-1, descending=True, stable=True).indices
    expert_ids = best[..., :topk].contiguous()
    weights = affinity.gather(-1, expert_ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scaling, expert_ids


def moe_route_backward_ref(
    grad: Tensor, weights: Tensor, expert_ids: Tensor, logits: Tensor, *, scaling: float
) -> Tensor:
    """The gradient of the logits; weights are those that the choice returned."""
    softplus = F.softplus(logits.float())
    affinity = softplus.clamp(min=1e-30).sqrt()
    total = affinity.gather(-1, expert_ids).sum(dim=-1, keepdim=True)
    grad = (scaling * grad - (grad * weights).sum(dim=-1, keepdim=True)) / total
    slope = torch.where(softplus < 1e-30, 0.0, logits.float().sigmoid() / (2 * affinity))
    d_affinity = torch.zeros_like(slope).scatter(-1, expert_ids, grad)
    return (d_affinity * slope).type_as(logits)


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
        y = F.linear(swiglu_ref(gate, up, swiglu_limit), down[expert_id].to(x.dtype))
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
    d_x, d_weights = torch.zeros_like(x), torch.zeros_like(weights)
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert_id in range(gate_up.shape[0]):
        rows, choice = torch.where(expert_ids == expert_id)
        if rows.numel() == 0:
            continue
        first, second = gate_up[expert_id].to(x.dtype), down[expert_id].to(x.dtype)
        gate, up = F.linear(x[rows], first).chunk(2, dim=-1)
        act = swiglu_ref(gate, up, swiglu_limit)
        d_out = grad[rows] * weights[rows, choice, None].to(x.dtype)
        d_weights[rows, choice] = (grad[rows] * F.linear(act, second)).sum(-1).type_as(weights)
        d_h = _swiglu_backward(d_out @ second, gate, up, swiglu_limit)
        d_down[expert_id] = (d_out.t() @ act).type_as(down)
        d_gate_up[expert_id] = (d_h.t() @ x[rows]).type_as(gate_up)
        d_x = d_x.index_add(0, rows, d_h @ first)
    return d_x, d_weights, d_gate_up, d_down


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """The gradient of gate and up, behind each other."""
    kept_gate, kept_up = gate, up
    if limit is not None:
        kept_gate, kept_up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = kept_gate.sigmoid()
    d_gate = grad * kept_up * sigmoid * (1 + kept_gate * (1 - sigmoid))
    d_up = grad * kept_gate * sigmoid
    d_gate, d_up = d_gate * (kept_gate == gate), d_up * (kept_up == up)
    return torch.cat([d_gate, d_up], dim=-1)


def moe_experts_fp8_ref(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    *,
    swiglu_limit: float | None,
) -> Tensor:
    """See `model1.ops.moe.fp8.moe_experts_fp8`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert_id in range(gate_up.shape[0]):
        rows, choice = torch.where(expert_ids == expert_id)
        if rows.numel() == 0:
            continue
        h = _fp8_product(x[rows], gate_up[expert_id], gate_up_scale[expert_id])
        gate, up = h.float().chunk(2, dim=-1)
        act = swiglu_ref(gate, up, swiglu_limit) * weights[rows, choice, None].float()
        y = _fp8_product(act.type_as(x), down[expert_id], down_scale[expert_id])
        out = out.index_add(0, rows, y.float())
    return out.type_as(x)


def _fp8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    x_fp8, x_scale, _, _ = fp8_quantize_ref(x, kind="rows", power_of_two=True)
    out = fp8_matmul_ref(x_fp8, x_scale, codes, scale, b_is_blocks=True, out_dtype=x.dtype)
    return out[: x.shape[0]]

"""Plain PyTorch mixture of experts: routing and a loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.activation.ref import swiglu_ref


def moe_route_ref(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.moe.moe_route`."""
    # In fp32 softplus is 0 for logits under -100, where the root has no finite slope.
    affinity = F.softplus(logits.float()).clamp(min=1e-30).sqrt()
    expert_ids = (affinity.detach() + balance_bias).topk(topk, dim=-1).indices
    weights = affinity.gather(-1, expert_ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scaling, expert_ids


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

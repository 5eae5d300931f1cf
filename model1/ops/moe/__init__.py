"""Mixture of experts: bias-balanced routing and the routed feed-forwards. Dropless."""

from __future__ import annotations

from torch import Tensor

from model1.ops.moe.ref import moe_experts_ref, moe_route_ref


def moe_route(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose topk experts of each token.

    g = sqrt(softplus(logits)); the choice is the topk of g + balance_bias; the weights are the
    chosen g without the bias, normalised to sum 1, times `scaling`. logits: [t, e]; balance_bias:
    [e], no gradient. Returns weights [t, topk] fp32 and expert_ids [t, topk] int64.
    Source: DeepSeek-V4 (arXiv 2606.19348); bias balancing: arXiv 2408.15664.
    """
    if not 0 < topk <= logits.shape[-1]:
        raise ValueError(f"topk must be in 1..{logits.shape[-1]}, got {topk}")
    if balance_bias.shape != logits.shape[-1:]:
        raise ValueError(
            f"balance_bias must be [{logits.shape[-1]}], got {list(balance_bias.shape)}"
        )
    return moe_route_ref(logits, balance_bias, topk=topk, scaling=scaling)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    swiglu_limit: float | None,
) -> Tensor:
    """sum over the chosen experts of weight * down_e swiglu(gate_up_e x), [t, c].

    x: [t, c]; weights, expert_ids: [t, topk] of `moe_route`; gate_up: [e, 2*m, c], gate rows first;
    down: [e, c, m].
    """
    if weights.shape != expert_ids.shape or weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights and expert_ids must be [{x.shape[0]}, topk], "
            f"got {list(weights.shape)}, {list(expert_ids.shape)}"
        )
    return moe_experts_ref(x, weights, expert_ids, gate_up, down, swiglu_limit=swiglu_limit)

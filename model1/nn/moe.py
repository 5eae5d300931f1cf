"""Feed-forward sublayers: dense SwiGLU, and DeepSeekMoE with shared and routed experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.layers import JointLinear, Linear, new_weight
from model1.ops.activation import swiglu
from model1.ops.moe import moe_experts, moe_route

BALANCE_STEP = 1e-3  # bias update per optimiser step, DeepSeek-V3 (arXiv 2412.19437)


class FeedForward(nn.Module):
    """w2 (silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, intermediate_size)
        self.w3 = Linear(config.hidden_size, intermediate_size)
        self.w2 = Linear(intermediate_size, config.hidden_size, zero_init=True)
        self.joint = JointLinear()

    def pack_int8(self) -> None:
        """Join the packed copies of the two maps that read x."""
        self.joint.pack_int8(self.w1, self.w3)

    def forward(self, x: Tensor) -> Tensor:
        """[t, c] to [t, c]."""
        gate, up = self.joint(x, self.w1, self.w3)
        return self.w2(swiglu(gate, up, self.limit))


class MixtureOfExperts(nn.Module):
    """Shared experts plus the chosen routed ones; a per-expert bias evens out the load."""

    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.moe, self.limit = moe, config.swiglu_limit
        c, m, e = config.hidden_size, moe.moe_intermediate_size, moe.n_routed_experts
        self.gate = Linear(c, e)
        self.balance_bias = nn.Parameter(torch.zeros(e), requires_grad=False)
        self.gate_up = new_weight(e, 2 * m, c, std=c**-0.5)
        self.down = nn.Parameter(torch.zeros(e, c, m))
        shared = moe.n_shared_experts
        self.shared_experts = FeedForward(config, shared * m) if shared else None
        self.register_buffer("load", torch.zeros(e), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[t, c] to [t, c]; in training the tokens per expert are counted for the balance."""
        weights, expert_ids = moe_route(
            self.gate(x), self.balance_bias,
            topk=self.moe.num_experts_per_tok, scaling=self.moe.routed_scaling_factor,
        )  # fmt: skip
        if self.training and torch.is_grad_enabled():  # measuring in between does not count
            # counts in fp32 are exact, in any order; `bincount` would wait for the device
            chosen = expert_ids.flatten()
            counts = torch.zeros_like(self.load, dtype=torch.float32)
            self.load += counts.scatter_add_(0, chosen, counts.new_ones(chosen.shape))
        out = moe_experts(x, weights, expert_ids, self.gate_up, self.down, swiglu_limit=self.limit)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    @torch.no_grad()
    def update_balance(self) -> None:
        """Raise the bias of experts that got less than their share, lower the others'."""
        self.balance_bias += BALANCE_STEP * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

"""Position awareness of values: output gate and length temperature, each neutral at the start.

The third part, rotary value channels turned back on the output, lives in `nn.attention`; the
fourth, YaRN, in the frequencies of `nn.context`. All four can be switched one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.layers import Linear


class OutputGate(nn.Module):
    """g[t, h] = 2 sigmoid(x W_g + c_h ln((i + 1) / L0)); exactly 1 at initialisation.

    Source of the gate: arXiv 2505.06708 (headwise form); the position term is ours.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.attention.num_attention_heads
        self.proj = Linear(config.hidden_size, heads, zero_init=True)
        self.position_slope = nn.Parameter(torch.zeros(heads))

    def forward(self, logits: Tensor, log_position: Tensor) -> Tensor:
        """logits [t, h] = x W_g and log_position [t] = ln((i + 1) / L0) to gates [t, h]."""
        moved = torch.addcmul(logits.float(), log_position.unsqueeze(1), self.position_slope)
        return (2.0 * torch.sigmoid(moved)).type_as(logits)


class LogTemperature(nn.Module):
    """f[t, h] = 1 + s_h ln(max(n, L0) / L0) with n = i + 1 visible tokens; exactly 1 at first.

    Multiplies the attention logits. Source: arXiv 2501.19399, shifted to be neutral up to L0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(config.attention.num_attention_heads))

    def forward(self, log_position: Tensor) -> Tensor:
        """log_position [t] = ln((i + 1) / L0) to factors [t, h] fp32."""
        return 1.0 + log_position.clamp(min=0.0).unsqueeze(1) * self.slope

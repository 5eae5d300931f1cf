"""Multi-token prediction: one extra block that predicts the token after the next, in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.layers import Linear, RmsNorm
from model1.nn.single_pass import is_single_pass, new_block, new_head, run_layers

if TYPE_CHECKING:
    from model1.nn.context import Context


class MultiTokenPrediction(nn.Module):
    """h'_i = Block(W [norm(h_i), norm(embed(x_{i+1}))]), read by the shared output head.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, eps = config.hidden_size, config.rms_norm_eps
        self.num_streams = config.num_streams
        self.is_single_pass = is_single_pass(config)
        self.hidden_norm, self.embed_norm = RmsNorm(c, eps), RmsNorm(c, eps)
        self.proj = Linear(2 * c, c)
        self.block = new_block(config, config.num_hidden_layers)
        self.head = new_head(config)
        self.norm = RmsNorm(c, eps)

    def forward(self, hidden: Tensor, next_embedding: Tensor, context: Context) -> Tensor:
        """hidden [t, c] and the next tokens' embeddings [t, c] to hidden [t, c]."""
        joined = torch.cat([self.hidden_norm(hidden), self.embed_norm(next_embedding)], dim=-1)
        x = self.proj(joined)[:, None].expand(-1, self.num_streams, -1)
        if self.is_single_pass:
            return run_layers([self.block], x, context, self.norm, lambda _: None)
        x, _ = self.block(x, None, context)
        return self.norm(x[:, 0]) if self.head is None else self.head(x, self.norm)

"""One layer: Engram, attention and feed-forward on n residual streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.attention import Attention
from model1.nn.engram import Engram
from model1.nn.layers import RmsNorm
from model1.nn.mhc import HyperConnection
from model1.nn.moe import FeedForward, MixtureOfExperts
from model1.ops.engram import HashSpec

if TYPE_CHECKING:
    from model1.nn.context import Context


class Block(nn.Module):
    """x [t, n, c] to x [t, n, c]; n = 1 is the plain residual."""

    def __init__(
        self, config: ModelConfig, layer_id: int, hash_spec: HashSpec | None = None
    ) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.engram = None if hash_spec is None else Engram(config, layer_id, hash_spec)
        self.attn_norm = RmsNorm(config.hidden_size, eps)
        self.attn = Attention(config, layer_id)
        self.ffn_norm = RmsNorm(config.hidden_size, eps)
        moe = config.moe
        self.ffn: nn.Module
        if moe is None or layer_id < moe.first_k_dense_replace:
            self.ffn = FeedForward(config, config.intermediate_size)
        else:
            self.ffn = MixtureOfExperts(config)
        self.mhc_attn = HyperConnection(config) if config.mhc is not None else None
        self.mhc_ffn = HyperConnection(config) if config.mhc is not None else None

    def forward(self, x: Tensor, rows: Tensor | None, context: Context) -> Tensor:
        """rows: this layer's Engram rows, None where it has no memory."""
        if self.engram is not None:
            assert rows is not None
            x = self.engram(x, rows, context)
        x = _residual(x, self.mhc_attn, lambda u: self.attn(self.attn_norm(u), context))
        return _residual(x, self.mhc_ffn, lambda u: self.ffn(self.ffn_norm(u)))


def _residual(
    x: Tensor, connection: HyperConnection | None, sublayer: Callable[[Tensor], Tensor]
) -> Tensor:
    if connection is None:
        return x + sublayer(x[:, 0])[:, None]
    weights = connection.coefficients(x)
    y = sublayer(connection.collapse(x, weights))
    return connection.write_back(x, y, weights)

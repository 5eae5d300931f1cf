"""One layer: Engram, attention and feed-forward on n residual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.attention import Attention
from model1.nn.engram import Engram
from model1.nn.layers import RmsNorm
from model1.nn.mhc import HyperConnection
from model1.nn.moe import FeedForward, MixtureOfExperts
from model1.ops.engram import HashSpec
from model1.ops.mhc import MhcCoefficients

if TYPE_CHECKING:
    from model1.nn.context import Context


class Block(nn.Module):
    """x [t, n, c] to x [t, n, c]; n = 1 is the plain residual.

    `before` and `after` hold everything but the attending itself, which needs the context's keys:
    two functions without side effects, so that each can be compiled.
    """

    def __init__(
        self, config: ModelConfig, layer_id: int, hash_spec: HashSpec | None = None
    ) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.layer_id = layer_id
        self.engram = None if hash_spec is None else Engram(config, layer_id, hash_spec)
        self.attn_norm = RmsNorm(config.hidden_size, eps)
        self.attn = Attention(config)
        self.ffn_norm = RmsNorm(config.hidden_size, eps)
        moe = config.moe
        self.ffn: nn.Module
        if moe is None or layer_id < moe.first_k_dense_replace:
            self.ffn = FeedForward(config, config.intermediate_size)
        else:
            self.ffn = MixtureOfExperts(config)
        self.mhc_attn = HyperConnection(config) if config.mhc is not None else None
        self.mhc_ffn = HyperConnection(config) if config.mhc is not None else None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the two halves; the attention between them chooses its own kernel."""
        self.before = torch.compile(self.before, *args, **kwargs)
        self.after = torch.compile(self.after, *args, **kwargs)

    def forward(self, x: Tensor, rows: Tensor | None, context: Context) -> Tensor:
        """rows: this layer's Engram rows, None where it has no memory."""
        x, weights, q, kv, gate = self.before(x, rows, context)
        out = context.attend(self.layer_id, q, kv, self.attn.spec)
        return self.after(x, weights, out, gate, context)

    def before(
        self, x: Tensor, rows: Tensor | None, context: Context
    ) -> tuple[Tensor, MhcCoefficients | None, Tensor, Tensor, Tensor | None]:
        """Streams, mixing weights, queries, latents and the output's gate."""
        if self.engram is not None:
            assert rows is not None
            x = self.engram(x, rows, context)
        u, weights = _collapse(x, self.mhc_attn)
        q, kv, gate = self.attn.project(self.layer_id, self.attn_norm(u), context)
        return x, weights, q, kv, gate

    def after(
        self,
        x: Tensor,
        weights: MhcCoefficients | None,
        out: Tensor,
        gate: Tensor | None,
        context: Context,
    ) -> Tensor:
        """Output projection, write-back and the feed-forward sublayer."""
        y = self.attn.finish(out.type_as(x), gate, context)
        if self.mhc_ffn is None:
            u, total = self.ffn_norm.of_sum(y, x[:, 0])
            return (total + self.ffn(u))[:, None]
        x = _write_back(x, y, weights, self.mhc_attn)
        u, weights = _collapse(x, self.mhc_ffn)
        return _write_back(x, self.ffn(self.ffn_norm(u)), weights, self.mhc_ffn)


def _collapse(
    x: Tensor, connection: HyperConnection | None
) -> tuple[Tensor, MhcCoefficients | None]:
    if connection is None:
        return x[:, 0], None
    weights = connection.coefficients(x)
    return connection.collapse(x, weights), weights


def _write_back(
    x: Tensor, y: Tensor, weights: MhcCoefficients | None, connection: HyperConnection | None
) -> Tensor:
    if connection is None or weights is None:
        return x + y[:, None]
    return connection.write_back(x, y, weights)

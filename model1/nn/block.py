"""One layer: Engram, attention and feed-forward on n residual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.attention import Attention
from model1.nn.engram import Engram
from model1.nn.layers import RmsNorm
from model1.nn.mhc import HyperConnection, Start
from model1.nn.moe import FeedForward, MixtureOfExperts
from model1.ops.engram import HashSpec

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

    @property
    def entrance(self) -> tuple[HyperConnection, RmsNorm] | None:
        """What collapses the streams as the layer before writes them; a memory changes them."""
        if self.mhc_attn is None or self.engram is not None:
            return None
        return self.mhc_attn, self.attn_norm

    def forward(
        self,
        x: Tensor,
        rows: Tensor | None,
        context: Context,
        start: Start | None = None,
        behind: tuple[HyperConnection, RmsNorm] | None = None,
    ) -> tuple[Tensor, Start | None]:
        """The streams, and what the layer behind starts from.

        rows: this layer's Engram rows, None where it has no memory. start: what the layer before
        returned, None if it knew no `behind`, the next layer's `entrance`.
        """
        x, start, q, kv, gate = self.before(x, rows, context, start)
        out = context.attend(self.layer_id, q, kv, self.attn.spec)
        return self.after(x, start, out, gate, context, behind)

    def before(
        self, x: Tensor, rows: Tensor | None, context: Context, start: Start | None
    ) -> tuple[Tensor, Start | None, Tensor, Tensor, Tensor | None]:
        """Streams, what the attention started from, queries, latents and the output's gate."""
        if self.engram is not None:
            assert rows is not None
            x = self.engram(x, rows, context)
        if self.mhc_attn is None:
            u = self.attn_norm(x[:, 0])
        else:
            if start is None:
                x, start = self.mhc_attn.enter(x, self.attn_norm)
            u = start.u
        q, kv, gate = self.attn.project(self.layer_id, u, context)
        return x, start, q, kv, gate

    def after(
        self,
        x: Tensor,
        start: Start | None,
        out: Tensor,
        gate: Tensor | None,
        context: Context,
        behind: tuple[HyperConnection, RmsNorm] | None,
    ) -> tuple[Tensor, Start | None]:
        """Output projection, write-back and the feed-forward sublayer."""
        y = self.attn.finish(out.type_as(x), gate, context)
        if self.mhc_ffn is None or start is None:
            u, total = self.ffn_norm.of_sum(y, x[:, 0])
            return (total + self.ffn(u))[:, None], None
        x, start = self.mhc_ffn.enter_after(x, y, start, self.ffn_norm)
        y = self.ffn(start.u)
        if behind is None:
            return self.mhc_ffn.write_back(x, y, start), None
        connection, norm = behind
        return connection.enter_after(x, y, start, norm)

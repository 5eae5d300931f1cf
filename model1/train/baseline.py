"""A plain transformer to compare with: what the trainer does without any part of Model1.

Pre-norm RMSNorm, rotary positions, causal multi-head attention within the document, SwiGLU,
tied embeddings (the Llama form). It has the training interface of `model1.nn.model.Model`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.errors import ConfigError
from model1.strict import build_dataclass

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PlainAttention = Literal["sdpa", "flex"]
MODEL_TYPE = "model1_plain"
# Width over depth of small, deep models; the search stays near it.
ASPECT = 40.0
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainConfig:
    """Shape of a plain transformer."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_size < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size must be a multiple of 2 * num_attention_heads "
                f"{2 * self.num_attention_heads}, got {self.hidden_size}"
            )

    @property
    def num_parameters(self) -> int:
        """All parameters, the tied embedding counted once."""
        c, f = self.hidden_size, self.intermediate_size
        layer = 4 * c * c + 3 * c * f + 2 * c
        return self.vocab_size * c + self.num_hidden_layers * layer + c

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlainConfig:
        """Strict inverse of `to_dict`. Errors: `ConfigError`."""
        data = dict(data)
        if (found := data.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError(f"model_type must be {MODEL_TYPE!r}, got {found!r}")
        return build_dataclass(cls, data)


def match_parameters(total: int, *, vocab_size: int, max_position_embeddings: int) -> PlainConfig:
    """A shape whose parameter count is within 1 % of `total`, near the usual proportions.

    Tries every depth and width, fills up with the feed-forward width and takes the shape nearest
    to width / depth = ASPECT and intermediate = 8/3 width. Errors: `ConfigError` if none fits.
    """
    best: tuple[float, PlainConfig] | None = None
    for head_dim in (64, 32, 16):
        for hidden in range(head_dim, 8192, head_dim):
            if vocab_size * hidden > total:
                break
            for depth in range(1, 129):
                found = _filled(total, hidden, depth, head_dim, vocab_size, max_position_embeddings)
                if found is not None and (best is None or found[0] < best[0]):
                    best = found
        if best is not None:
            return best[1]
    raise ConfigError(
        f"no plain transformer with vocab_size {vocab_size} has {total} parameters within 1 %"
    )


def _filled(
    total: int, hidden: int, depth: int, head_dim: int, vocab_size: int, positions: int
) -> tuple[float, PlainConfig] | None:
    rest = total - vocab_size * hidden - hidden - depth * (4 * hidden * hidden + 2 * hidden)
    inner = round(rest / (3 * hidden * depth) / 8) * 8
    if not 1.5 * hidden <= inner <= 5 * hidden:
        return None
    config = PlainConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=depth,
        intermediate_size=inner,
        num_attention_heads=hidden // head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )
    if abs(config.num_parameters - total) > 0.01 * total:
        return None
    cost = abs(math.log(hidden / depth / ASPECT)) + abs(math.log(inner / hidden * 3 / 8))
    return cost, config


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class PlainBlock(nn.Module):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        c, f = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.attn_norm = nn.RMSNorm(c, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(c, eps=config.rms_norm_eps)
        self.q_proj, self.k_proj = nn.Linear(c, c, bias=False), nn.Linear(c, c, bias=False)
        self.v_proj, self.o_proj = nn.Linear(c, c, bias=False), nn.Linear(c, c, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(c, f, bias=False), nn.Linear(c, f, bias=False)
        self.down_proj = nn.Linear(f, c, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask) -> Tensor:
        """x [b, s, c]; cos and sin [s, d / 2]; mask bool [b, 1, s, s] or a flex block mask."""
        x = x + self._attend(self.attn_norm(x), cos, sin, mask)
        h = self.ffn_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def _attend(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask) -> Tensor:
        q, k, v = (
            project(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if isinstance(mask, Tensor):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            from torch.nn.attention.flex_attention import flex_attention

            out = flex_attention(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class PlainTransformer(nn.Module):
    """The baseline. attention "flex" needs the blocks or the model to be compiled to be fast."""

    def __init__(self, config: PlainConfig, *, attention: PlainAttention = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dim = config.hidden_size // config.num_attention_heads
        frequencies = config.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # Residual writers start smaller so that the stream does not grow with depth (GPT-2).
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers
                nn.init.normal_(parameter, std=INIT_STD / (math.sqrt(depth) if writes else 1.0))

    @property
    def output_weight(self) -> Tensor:
        """The tied embedding [vocab, c]."""
        return self.embed.weight

    def num_parameters(self) -> dict[str, int]:
        """Parameter counts under the keys that Model1 uses."""
        return {"total": sum(p.numel() for p in self.parameters()), "tables": 0}

    def forward_hidden(
        self, input_ids: Tensor, *, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states [b, s, c] after the last norm, and no extra loss terms.

        input_ids and doc_starts int64 [b, s]; without doc_starts a row is one document. A token
        attends to tokens of its own document only; rotary positions count from the row's start.
        """
        starts = torch.zeros_like(input_ids) if doc_starts is None else doc_starts
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = positions[:, None] * self.get_buffer("frequencies")
        mask = self._mask(starts, positions)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x), {}

    def _mask(self, starts: Tensor, positions: Tensor) -> Tensor | BlockMask:
        if self.attention == "sdpa":
            causal = positions[:, None] >= positions
            return (causal & (positions >= starts[:, :, None]))[:, None]

        # Not at the top: importing it starts the compiler's machinery.
        from model1.ops.dense_attention.flex import packed_block_mask

        return packed_block_mask(starts)

    def forward(self, input_ids: Tensor, *, doc_starts: Tensor | None = None) -> Tensor:
        """Logits [b, s, vocab]."""
        return self.forward_hidden(input_ids, doc_starts=doc_starts)[0] @ self.output_weight.T

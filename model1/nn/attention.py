"""Latent attention: low-rank queries, one shared key/value latent, grouped low-rank output.

Form "model1": the latent itself is key and value, its rotary channels included; the output's
rotary channels are turned back, so that only relative offsets remain (arXiv 2606.19348).
Form "v32": per-head up-projections absorbed into query and output, the value is the unrotated
latent (arXiv 2405.04434, DeepSeek-V3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.indexer import LowRankSelector
from model1.nn.layers import JointLinear, Linear, RmsNorm, new_weight
from model1.nn.vvpa import LogTemperature, OutputGate
from model1.ops.rope import apply_rope, norm_rotate_tail

if TYPE_CHECKING:
    from model1.nn.context import Context


class AttendSpec(NamedTuple):
    """What a context needs to know to run one layer's attention."""

    value_dim: int
    softmax_scale: float
    attn_sink: Tensor | None  # [h] fp32
    selector: LowRankSelector | None
    kv_norm: RmsNorm  # of a token's first channels, in V3.2 without the rotary ones


class Attention(nn.Module):
    """Weights of one attention sublayer: what comes before and after the attending itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.attention
        self.form = a.form
        self.heads, self.groups = a.num_attention_heads, a.o_groups
        self.rope_dim, self.eps = a.qk_rope_head_dim, config.rms_norm_eps
        self.rotary_value, self.value_dim = config.vvpa.rotary_value, config.value_dim
        self.softmax_scale = a.qk_head_dim**-0.5

        self.wq_a = Linear(config.hidden_size, a.q_lora_rank)
        self.q_norm = RmsNorm(a.q_lora_rank, self.eps)
        self.wq_b = Linear(a.q_lora_rank, self.heads * a.qk_head_dim)
        self.wkv = Linear(config.hidden_size, a.latent_dim)
        # V3.2 leaves the rotary key outside the normalisation, MODEL1 has it inside.
        self.kv_norm = RmsNorm(a.latent_dim if a.form == "model1" else a.latent_nope_dim, self.eps)
        out_dim = self.value_dim
        if a.form == "v32":
            assert a.v_head_dim is not None
            assert a.kv_lora_rank is not None
            out_dim = a.v_head_dim
            std = a.kv_lora_rank**-0.5
            self.wk_b = new_weight(self.heads, a.qk_nope_head_dim, a.kv_lora_rank, std=std)
            self.wv_b = new_weight(self.heads, out_dim, a.kv_lora_rank, std=std)
        group_in = self.heads // self.groups * out_dim
        self.wo_a = new_weight(self.groups, a.o_lora_rank, group_in, std=group_in**-0.5)
        self.wo_b = Linear(self.groups * a.o_lora_rank, config.hidden_size, zero_init=True)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads)) if a.attn_sink else None
        self.gate = OutputGate(config) if config.vvpa.output_gate else None
        self.temperature = LogTemperature(config) if config.vvpa.log_temperature else None
        self.selector = LowRankSelector(config) if config.sparse is not None else None
        self.joint = JointLinear(joins_training=True)

    @property
    def spec(self) -> AttendSpec:
        """How a context has to attend for this layer."""
        return AttendSpec(
            self.value_dim, self.softmax_scale, self.attn_sink, self.selector, self.kv_norm
        )

    def _maps(self) -> list[Linear]:
        """What reads x."""
        gates = [] if self.gate is None else [self.gate.proj]
        return [self.wq_a, self.wkv, *gates]

    def pack_int8(self) -> None:
        """Join the packed copies of the maps that read x."""
        self.joint.pack_int8(*self._maps())

    def project(
        self, layer_id: int, x: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of x [t, c]: queries [t, h, d], what the context makes of its latents, gate [t, h]."""
        low, kv, *logits = self.joint(x, *self._maps())
        gate = None if self.gate is None else self.gate(logits[0], context.log_position)
        return self._queries(low, context), context.latents(layer_id, kv, self.spec), gate

    def finish(self, out: Tensor, gate: Tensor | None, context: Context) -> Tensor:
        """[t, c] from the attended values [t, h, value_dim] and the gate, in out's dtype."""
        if self.form == "v32":
            out = torch.einsum("thc,hvc->thv", out, self.wv_b.to(out.dtype))
        out = context.finish_values(out, gate, is_rotary=self.rotary_value)
        num_tokens = out.shape[0]
        grouped = out.reshape(num_tokens, self.groups, -1).transpose(0, 1)
        low = torch.bmm(grouped, self.wo_a.type_as(out).transpose(1, 2))
        return self.wo_b(low.transpose(0, 1).reshape(num_tokens, -1))

    def _queries(self, low: Tensor, context: Context) -> Tensor:
        """Queries in the latent's coordinates, rotated and tempered, [t, h, d]."""
        q = self.wq_b(self.q_norm(low))
        q = q.view(q.shape[0], self.heads, -1)
        if self.form == "model1":
            q = norm_rotate_tail(q, context.rotation, norm_eps=self.eps)
        else:
            nope, rotary = q.split([q.shape[-1] - self.rope_dim, self.rope_dim], dim=-1)
            nope = torch.einsum("thn,hnc->thc", nope, self.wk_b.to(q.dtype))
            q = torch.cat([nope, apply_rope(rotary, context.rotation)], dim=-1)
        if self.temperature is not None:
            q = q * self.temperature(context.log_position).unsqueeze(-1).type_as(q)
        return q

"""The whole attention sublayer against textbook loops over heads, in double precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import assert_near, double_precision
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.nn.attention import Attention
from model1.nn.context import FullContext

T = 24
HEADS, ROPE = 4, 32


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def turn(x: Tensor, positions: Tensor, sign: float = 1.0) -> Tensor:
    """RoPE of [t, d] as complex multiplication, theta 10000."""
    d = x.shape[-1]
    rate = 1e4 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    phase = torch.polar(torch.ones(1, dtype=torch.float64), sign * positions[:, None] * rate)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phase).flatten(-2)


def causal_softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """[t, t] probabilities with an optional extra logit that takes mass and gives nothing."""
    e = torch.exp(scores).tril()
    return e / (e.sum(-1, keepdim=True) + (0.0 if sink is None else torch.exp(sink)))


def grouped_output(heads: list[Tensor], attention: Attention) -> Tensor:
    """Heads of a group side by side, a projection of its own for each group, then one for all."""
    per_group = len(heads) // attention.groups
    low = [
        torch.cat(heads[g * per_group : (g + 1) * per_group], dim=-1) @ attention.wo_a[g].T
        for g in range(attention.groups)
    ]
    return torch.cat(low, dim=-1) @ attention.wo_b.weight.T


def textbook_mla(attention: Attention, config: ModelConfig, x: Tensor) -> Tensor:
    """DeepSeek-V2 multi-head latent attention with keys and values expanded per head."""
    positions = torch.arange(len(x), dtype=torch.float64)
    a = config.attention
    assert a.kv_lora_rank is not None
    query = rms(x @ attention.wq_a.weight.T, attention.q_norm.weight) @ attention.wq_b.weight.T
    down = x @ attention.wkv.weight.T
    latent = rms(down[:, : a.kv_lora_rank], attention.kv_norm.weight)
    shared_rope = turn(down[:, a.kv_lora_rank :], positions)  # outside the normalisation
    heads = []
    for head in range(HEADS):
        q = query.unflatten(-1, (HEADS, -1))[:, head]
        q = torch.cat([q[:, : a.qk_nope_head_dim], turn(q[:, a.qk_nope_head_dim :], positions)], -1)
        key = torch.cat([latent @ attention.wk_b[head].T, shared_rope], dim=-1)
        value = latent @ attention.wv_b[head].T
        scores = q @ key.T * (a.qk_nope_head_dim + ROPE) ** -0.5
        sink = None if attention.attn_sink is None else attention.attn_sink[head]
        heads.append(causal_softmax(scores, sink) @ value)
    return grouped_output(heads, attention)


def textbook_model1(attention: Attention, config: ModelConfig, x: Tensor) -> Tensor:
    """One normalised latent is key and value of every head; outputs are turned back."""
    positions = torch.arange(len(x), dtype=torch.float64)
    nope = config.attention.qk_nope_head_dim
    query = rms(x @ attention.wq_a.weight.T, attention.q_norm.weight) @ attention.wq_b.weight.T
    latent = rms(x @ attention.wkv.weight.T, attention.kv_norm.weight)
    latent = torch.cat([latent[:, :nope], turn(latent[:, nope:], positions)], dim=-1)
    heads = []
    for head in range(HEADS):
        q = rms(query.unflatten(-1, (HEADS, -1))[:, head], None)
        q = torch.cat([q[:, :nope], turn(q[:, nope:], positions)], dim=-1)
        scores = q @ latent.T * (nope + ROPE) ** -0.5
        assert attention.attn_sink is not None
        out = causal_softmax(scores, attention.attn_sink[head]) @ latent
        heads.append(torch.cat([out[:, :nope], turn(out[:, nope:], positions, -1.0)], dim=-1))
    return grouped_output(heads, attention)


def sublayer(attention: Attention, config: ModelConfig, x: Tensor) -> Tensor:
    starts = torch.zeros(1, len(x), dtype=torch.int64)
    with double_precision():
        context = FullContext(config, starts, x.dtype, dense=True)
        q, kv, gate = attention.project(0, x, context)
        return attention.finish(context.attend(0, q, kv, attention.spec), gate, context)


def random_attention(config: ModelConfig) -> tuple[Attention, Tensor]:
    attention = Attention(config).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return attention, torch.randn(T, config.hidden_size, dtype=torch.float64)


def without_vvpa(config: ModelConfig, *, rotary_value: bool, sink: bool = True) -> ModelConfig:
    vvpa = dataclasses.replace(
        config.vvpa, rotary_value=rotary_value, output_gate=False, log_temperature=False, yarn=None
    )
    attention = dataclasses.replace(config.attention, attn_sink=sink)
    return dataclasses.replace(config, vvpa=vvpa, attention=attention, sparse=None)


@pytest.mark.parametrize("sink", [False, True])
def test_the_absorbed_form_is_textbook_latent_attention(sink: bool) -> None:
    config = without_vvpa(presets.tiny_v32(), rotary_value=False, sink=sink)
    attention, x = random_attention(config)
    with torch.no_grad():
        assert_near(sublayer(attention, config, x), textbook_mla(attention, config, x), 1e-10)


def test_the_absorbed_form_has_the_textbook_gradient() -> None:
    config = without_vvpa(presets.tiny_v32(), rotary_value=False)
    attention, x = random_attention(config)
    upstream = torch.randn(T, config.hidden_size, dtype=torch.float64)
    parameters = list(attention.parameters())
    got = torch.autograd.grad((sublayer(attention, config, x) * upstream).sum(), parameters)
    want = torch.autograd.grad((textbook_mla(attention, config, x) * upstream).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-8)


def test_model1_is_a_loop_over_heads() -> None:
    config = without_vvpa(presets.tiny(), rotary_value=True)
    attention, x = random_attention(config)
    with torch.no_grad():
        assert_near(sublayer(attention, config, x), textbook_model1(attention, config, x), 1e-10)


def test_model1_has_the_gradient_of_the_loop() -> None:
    config = without_vvpa(presets.tiny(), rotary_value=True)
    attention, x = random_attention(config)
    upstream = torch.randn(T, config.hidden_size, dtype=torch.float64)
    parameters = list(attention.parameters())
    got = torch.autograd.grad((sublayer(attention, config, x) * upstream).sum(), parameters)
    want = torch.autograd.grad((textbook_model1(attention, config, x) * upstream).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-8)


@pytest.mark.parametrize("form", ["model1", "v32"])
def test_gate_and_temperature_act_on_heads_and_logits(form: str) -> None:
    """With all of VVPA on, scaling queries and head outputs by hand gives the same sublayer."""
    preset = presets.tiny() if form == "model1" else presets.tiny_v32()
    config = dataclasses.replace(
        preset, sparse=None, vvpa=dataclasses.replace(preset.vvpa, yarn=None, reference_length=4)
    )
    attention, x = random_attention(config)
    bare_config = without_vvpa(config, rotary_value=config.vvpa.rotary_value)
    bare = Attention(bare_config).double()
    bare.load_state_dict(attention.state_dict(), strict=False)
    assert attention.gate is not None
    assert attention.temperature is not None
    starts = torch.zeros(1, T, dtype=torch.int64)
    with double_precision(), torch.no_grad():
        context = FullContext(config, starts, x.dtype, dense=True)
        q, kv, no_gate = bare.project(0, x, context)
        assert no_gate is None
        factor = attention.temperature(context.log_position)
        out = context.attend(0, q * factor[..., None], kv, bare.spec)
        gate = attention.gate(attention.gate.proj(x), context.log_position)
        want = bare.finish(out * gate[..., None], None, context)
        assert (factor[5:] != 1).all()
        assert_near(sublayer(attention, config, x), want, 1e-10)

"""What the presets promise: sizes, which parts are on, and that every weight takes part."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.nn.indexer import attention_cost
from model1.nn.model import Model
from model1.ops.kv_cache.layout import kv_layout

SMALL = {"tiny": presets.tiny(), "tiny_v32": presets.tiny_v32()}


def make(config: ModelConfig) -> Model:
    assert config.engram is not None
    size = config.engram.engram_compressed_vocab_size
    return Model(config, compression_table=np.arange(config.vocab_size) % size)


def switches(config: ModelConfig) -> dict[str, bool]:
    assert config.engram is not None
    return {
        "rotary_value": config.vvpa.rotary_value,
        "output_gate": config.vvpa.output_gate,
        "log_temperature": config.vvpa.log_temperature,
        "yarn": config.vvpa.yarn is not None,
        "attn_sink": config.attention.attn_sink,
        "sparse": config.sparse is not None,
        "mhc": config.mhc is not None,
        "moe": config.moe is not None,
        "engram": config.engram is not None,
        "convolution": config.engram.short_conv,
        "second head": config.num_nextn_predict_layers == 1,
        "untied": not config.tie_word_embeddings,
    }


def test_the_two_small_presets_together_switch_on_every_part_in_both_forms() -> None:
    one, two = (switches(c) for c in SMALL.values())
    assert all(one[name] or two[name] for name in one)
    assert {c.attention.form for c in SMALL.values()} == {"model1", "v32"}
    # Sparse attention, the temperature and the window all act within a short test.
    for config in SMALL.values():
        assert config.sparse is not None
        assert config.attention.sliding_window < config.sparse.index_topk
        assert config.sparse.index_topk < config.sparse.dense_below <= 32
        assert config.vvpa.reference_length <= 32


@pytest.mark.parametrize("name", list(SMALL))
def test_a_small_preset_has_a_few_hundred_thousand_parameters(name: str) -> None:
    counts = make(SMALL[name]).num_parameters()
    assert 100_000 < counts["total"] < 700_000
    assert counts["tables"] > 4 * 512 * 32


@pytest.mark.parametrize("name", list(SMALL))
def test_every_weight_of_a_small_preset_gets_a_gradient(name: str) -> None:
    model = make(SMALL[name]).train()
    with torch.no_grad():  # away from the zero start of outputs, gates and slopes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(0, 256, (4, 70))
    hidden, aux = model.forward_hidden(ids)
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids.flatten())
    (loss + sum(x.square().mean() for x in aux.values())).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in dead if not n.endswith("balance_bias")] == []


@pytest.mark.parametrize("name", list(SMALL))
def test_a_small_preset_learns_a_row_by_heart(name: str) -> None:
    model = make(SMALL[name])
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss() -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    first = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert first == pytest.approx(np.log(256), rel=0.15)
    assert loss().item() < 0.25 * first


def test_sizes_follow_the_tokenizer() -> None:
    config = presets.tiny(vocab_size=300, compressed_vocab_size=250)
    assert config.vocab_size == 300
    assert config.engram is not None
    assert config.engram.engram_compressed_vocab_size == 250
    other = presets.tiny_v32(vocab_size=300, compressed_vocab_size=250)
    assert (other.vocab_size, other.engram and other.engram.engram_compressed_vocab_size) == (
        300,
        250,
    )
    shipped = presets.code_small(compressed_vocab_size=123).engram
    assert shipped is not None
    assert shipped.engram_compressed_vocab_size == 123


# --- the shipped model -------------------------------------------------------------------


def shipped_parameters(config: ModelConfig) -> tuple[int, int]:
    """Total and table weights, counted from the sizes alone."""
    c, h, d = config.hidden_size, 6, 224
    attention = c * 192 + 192 + 192 * h * d + c * d + d  # wq_a, its norm, wq_b, wkv, its norm
    attention += 2 * 128 * (h // 2 * d) + 2 * 128 * c + h  # wo_a, wo_b, sink
    attention += h * c + h + h  # gate, its slope, temperature
    attention += 16 * 192 + 192  # basis and mean
    feed_forward = 3 * c * 960
    connections = 2 * (24 * 4 * c + 3 + 24)
    layer = attention + feed_forward + connections + 2 * c
    head = 4 * 4 * c + 1 + 4
    backbone = 8192 * c + 8 * layer + head + c
    engram = 2 * (256 * c * 5 + 4 * c)  # one joint key/value projection, one norm per stream
    return backbone, engram


def test_the_shipped_model_has_the_stated_parameters() -> None:
    config = presets.code_small(compressed_vocab_size=6000)
    with torch.device("meta"):
        model = Model(config, compression_table=np.arange(8192) % 6000)
    counts = model.num_parameters()
    backbone, engram = shipped_parameters(config)
    assert counts["total"] == backbone + engram + counts["tables"]
    assert counts["total"] == pytest.approx(24e6, rel=0.05)
    # Sixteen tables of primes just above 10,000, 32 channels each.
    assert 16 * 10_000 * 32 < counts["tables"] < 16 * 10_200 * 32


def test_the_shipped_model_has_every_part_on() -> None:
    config = presets.code_small(compressed_vocab_size=6000)
    on = switches(config)
    optional = {"yarn", "moe", "convolution", "second head", "untied"}
    assert {name for name, is_on in on.items() if not is_on} == optional
    assert config.engram is not None
    assert min(config.engram.engram_layer_ids) > 0  # the gate needs a layer of context


def test_the_shipped_attention_keeps_its_budget_wherever_it_is_sparse() -> None:
    config = presets.code_small(compressed_vocab_size=6000)
    assert config.sparse is not None
    limit = config.sparse.dense_below
    lengths = [*range(limit + 1, limit + 200), 3000, 4096, 5689, 8192, 16384, 10**6]
    assert max(attention_cost(config, n) for n in lengths) <= 0.30
    assert config.max_position_embeddings > limit


@pytest.mark.parametrize("name", ["tiny", "tiny_v32", "code_small"])
def test_every_preset_has_an_8_bit_cache_layout(name: str) -> None:
    config = SMALL.get(name) or presets.code_small(compressed_vocab_size=6000)
    a = config.attention
    small = kv_layout("fp8", a.form, a.latent_nope_dim, a.qk_rope_head_dim)
    full = kv_layout("fp32", a.form, a.latent_nope_dim, a.qk_rope_head_dim)
    # One byte per unrotated channel, two per rotary one, and the scales.
    exact = a.latent_nope_dim + 2 * a.qk_rope_head_dim
    assert exact < small.bytes_per_token <= exact + 16
    assert full.bytes_per_token == 4 * a.latent_dim


def test_the_hundred_million_model_has_every_part_on_and_an_8_bit_cache() -> None:
    config = presets.small_100m(compressed_vocab_size=6000)
    assert switches(config) == switches(presets.code_small(compressed_vocab_size=6000))
    with torch.device("meta"):
        counts = make(config).num_parameters()
    assert counts["total"] - counts["tables"] == pytest.approx(100e6, rel=0.03)
    a = config.attention
    assert kv_layout("fp8", a.form, a.latent_nope_dim, a.qk_rope_head_dim).bytes_per_token == 200


def test_presets_are_independent_values() -> None:
    assert presets.tiny() == presets.tiny()
    assert presets.tiny() is not presets.tiny()
    changed = dataclasses.replace(presets.tiny(), hidden_size=128)
    assert presets.tiny().hidden_size == 64 != changed.hidden_size

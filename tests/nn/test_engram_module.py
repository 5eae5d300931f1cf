"""The Engram layer: stored rows, sparse row gradients, the strict compression table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracles import assert_near
from torch import Tensor

from model1 import presets
from model1.config import EngramConfig, ModelConfig
from model1.errors import ConfigError
from model1.nn.engram import Engram, EngramTable, ngram_windows
from model1.nn.model import Model
from model1.ops.engram import build_hash_specs, quantize_rows
from tests.nn.helpers import build, compression


def engram_config() -> EngramConfig:
    config = presets.tiny().engram
    assert config is not None
    return config


def memory(model: Model) -> Engram:
    engram = model.layers[1].engram
    assert isinstance(engram, Engram)
    return engram


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


# --- stored rows -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "limit"), [("bf16", 0.01), ("fp8", 0.05), ("fp4", 0.15)])
def test_stored_rows_answer_like_the_trained_ones(kind: str, limit: float) -> None:
    model = build(presets.tiny())
    table = memory(model).table
    assert table.weight is not None
    torch.nn.init.normal_(table.weight)  # loud enough to matter in the logits
    counts = model.num_parameters()
    with torch.inference_mode():
        want = model(tokens())
        store = quantize_rows(table.weight, kind)  # type: ignore[arg-type]
        table.set_rows(store)
        got = model(tokens())
        table.set_rows(quantize_rows(torch.zeros(store.num_rows, store.dim), "bf16"))
        silent = model(tokens())
    # Measured against what the memory adds at all.
    assert (got - want).norm() <= limit * (silent - want).norm()
    assert table.weight is None
    assert model.num_parameters() == counts


def test_a_store_is_read_row_by_row_in_hash_order() -> None:
    table = EngramTable(50, 8)
    assert table.weight is not None
    rows = torch.tensor([[3, 49, 0], [7, 7, 12]])
    trained = table(rows)
    assert torch.equal(trained, table.weight[rows].flatten(1))
    store = quantize_rows(table.weight, "bf16")
    table.set_rows(store)
    assert torch.equal(table(rows), store.gather(rows).flatten(1))


def test_rows_of_another_table_are_refused() -> None:
    table = EngramTable(50, 8)
    with pytest.raises(ValueError, match=r"rows must be \[50, 8\], got \[49, 8\]"):
        table.set_rows(quantize_rows(torch.zeros(49, 8), "bf16"))
    with pytest.raises(ValueError, match=r"rows must be \[50, 8\], got \[50, 16\]"):
        table.set_rows(quantize_rows(torch.zeros(50, 16), "bf16"))


# --- gradients ---------------------------------------------------------------------------


def test_only_rows_that_were_read_get_a_gradient() -> None:
    model = build(presets.tiny())
    ids = tokens(1, 20)
    model(ids).square().sum().backward()
    engram = memory(model)
    windows = ngram_windows(ids[0], torch.arange(20), 3)
    read = engram.rows(windows, model.compression_table).unique()
    weight = engram.table.weight
    assert weight is not None
    assert weight.grad is not None
    touched = torch.nonzero(weight.grad.abs().sum(1))[:, 0]
    assert torch.equal(touched, read)
    assert len(read) < len(weight) // 4


def test_every_other_weight_of_the_memory_learns() -> None:
    config = presets.tiny()
    model = build(dataclasses.replace(config, engram=presets.tiny_v32().engram))
    model(tokens()).square().sum().backward()
    for name, parameter in memory(model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_convolution_is_silent_at_the_start() -> None:
    plain = build(presets.tiny())
    with_conv = dataclasses.replace(engram_config(), short_conv=True)
    model = Model(
        dataclasses.replace(presets.tiny(), engram=with_conv),
        compression_table=compression(presets.tiny()),
    ).eval()
    missing, _ = model.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["layers.1.engram.conv_norm", "layers.1.engram.conv_weight"]
    with torch.inference_mode():
        assert torch.equal(model(tokens()), plain(tokens()))


# --- n-grams -----------------------------------------------------------------------------


def test_windows_stop_at_the_start_of_each_document() -> None:
    ids = torch.tensor([10, 11, 12, 20, 21])
    positions = torch.tensor([0, 1, 2, 0, 1])
    want = [[10, -1, -1], [11, 10, -1], [12, 11, 10], [20, -1, -1], [21, 20, -1]]
    assert ngram_windows(ids, positions, 3).tolist() == want
    assert ngram_windows(ids[:1], positions[:1], 3).tolist() == [[10, -1, -1]]
    assert ngram_windows(ids, positions, 1).tolist() == [[i] for i in ids.tolist()]


def test_tokens_with_one_compressed_id_read_the_same_rows() -> None:
    model = build(presets.tiny())  # ids 200..255 compress to the same as 0..55
    engram, table = memory(model), model.compression_table
    a = engram.rows(torch.tensor([[7, 30, 2]]), table)
    b = engram.rows(torch.tensor([[207, 230, 202]]), table)
    assert torch.equal(a, b)
    # Order 2 does not read the third place, order 3 does.
    other = engram.rows(torch.tensor([[7, 30, 3]]), table)
    assert torch.equal(other[:, :2], a[:, :2])
    assert not torch.equal(other[:, 2:], a[:, 2:])


def test_a_memory_with_nothing_to_say_leaves_the_streams() -> None:
    config = engram_config()
    engram = Engram(presets.tiny(), 1, build_hash_specs(config)[1])
    torch.nn.init.zeros_(engram.wkv.weight)
    x, rows = torch.randn(4, 4, 64), torch.zeros(4, config.num_tables, dtype=torch.int64)
    assert torch.equal(engram(x, rows, None), x)  # type: ignore[arg-type]


def test_every_stream_has_its_own_gate_and_all_share_one_value() -> None:
    engram = Engram(presets.tiny(), 1, build_hash_specs(engram_config())[1])
    x, rows = torch.randn(6, 4, 64), torch.randint(0, 500, (6, 4))
    added = (engram(x, rows, None) - x).detach()  # type: ignore[arg-type]
    value = engram.wkv(engram.table(rows)).unflatten(-1, (5, 64))[:, -1].detach()
    gates = (added * value[:, None]).sum(-1) / value.square().sum(-1)[:, None]
    assert_near(added, gates[..., None] * value[:, None], 1e-5)
    assert ((gates > 0) & (gates < 1)).all()
    assert gates.std(dim=1).min() > 1e-3


# --- the compression table is a contract -------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.arange(256) % 199, "engram_compressed_vocab_size is 200"),
        (np.arange(256) % 201, "engram_compressed_vocab_size is 200"),
        (np.arange(255) % 200, "vocab_size 256 entries, got 255"),
        (np.arange(300) % 200, "vocab_size 256 entries, got 300"),
        ((np.arange(256) % 200)[None], "engram_compressed_vocab_size is 200"),
        (np.where(np.arange(256) == 7, -1, np.arange(256) % 200), "compressed_vocab_size is 200"),
    ],
)
def test_a_compression_table_of_another_size_is_refused(table: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Model(presets.tiny(), compression_table=table)


def test_the_table_is_wanted_exactly_with_engram() -> None:
    without: ModelConfig = dataclasses.replace(presets.tiny(), engram=None)
    with pytest.raises(ConfigError, match="exactly when the config has engram"):
        Model(presets.tiny())
    with pytest.raises(ConfigError, match="exactly when the config has engram"):
        Model(without, compression_table=np.arange(256) % 200)

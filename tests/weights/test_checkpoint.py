from __future__ import annotations

import dataclasses
import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from weights.conftest import PROVENANCE, SHARD_BYTES, Trained

from model1.config import ModelConfig
from model1.errors import CheckpointError, TokenizerError
from model1.nn.model import Model
from model1.weights import load_model, load_state, read_checkpoint, save_checkpoint
from model1.weights.formats import TableFormat, WeightFormat, tensor_kind

# Largest RMS error relative to a Gaussian tensor.
MATRIX_ERROR = {"fp32": 0.0, "bf16": 0.002, "fp8": 0.029}
# rows stored in fp32 are looked up in bf16
TABLE_ERROR = {"fp32": 0.002, "bf16": 0.002, "fp8": 0.029, "fp4": 0.08}


def save(directory: Path, what: Trained, **options: object) -> Path:
    arguments = {"tokenizer": what.tokenizer, "provenance": PROVENANCE, **options}
    return save_checkpoint(directory, what.model.state_dict(), what.config, **arguments)


def logits(model: Model, length: int = 40) -> torch.Tensor:
    ids = torch.arange(2 * length).remainder(model.config.vocab_size).view(2, length)
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("weights", get_args(WeightFormat))
@pytest.mark.parametrize("tables", get_args(TableFormat))
def test_error_of_every_tensor(
    any_trained: Trained, tmp_path: Path, weights: WeightFormat, tables: TableFormat
) -> None:
    save(tmp_path / "c", any_trained, weight_format=weights, table_format=tables)
    config, state = load_state(tmp_path / "c")
    assert config == any_trained.config
    original = any_trained.model.state_dict()
    assert set(state) == set(original)
    for name, tensor in state.items():
        limit = {"matrix": MATRIX_ERROR[weights], "table": TABLE_ERROR[tables], "keep": 0.0}
        error = float((tensor - original[name]).norm() / original[name].norm())
        assert tensor.dtype == torch.float32
        assert error <= limit[tensor_kind(name, tensor.shape)], name


def test_loaded_model_computes_what_its_tensors_say(any_trained: Trained, tmp_path: Path) -> None:
    save(tmp_path / "c", any_trained, table_format="fp4")
    config, state = load_state(tmp_path / "c")
    plain = Model(config, compression_table=any_trained.tokenizer.compression_table()).eval()
    plain.load_state_dict(state)
    model, tokenizer = load_model(tmp_path / "c")
    assert not model.training
    assert tokenizer.vocab_size == config.vocab_size
    assert model.num_parameters() == plain.num_parameters()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_fp32_weights_and_bf16_rows_give_the_original_logits(
    any_trained: Trained, tmp_path: Path
) -> None:
    rounded = {
        name: tensor.bfloat16().float() if "engram.table" in name else tensor
        for name, tensor in any_trained.model.state_dict().items()
    }
    table = any_trained.tokenizer.compression_table()
    model = Model(any_trained.config, compression_table=table).eval()
    model.load_state_dict(rounded)
    save(tmp_path / "c", any_trained, weight_format="fp32", table_format="bf16")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "c")[0]), logits(model), rtol=1e-5, atol=1e-5
    )


def test_bf16_keeps_what_must_be_exact(saved: Path) -> None:
    model, _ = load_model(saved, dtype=torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16
    kept = {"norm.weight", "layers.0.attn.attn_sink", "layers.0.mhc_attn.fn"}
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in kept} == {torch.float32}
    assert logits(model).isfinite().all()


def test_layout(saved: Path, small: Trained) -> None:
    names = {f.name for f in saved.iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) >= 3
    assert names - set(shards) == {
        "MANIFEST.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in saved.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
        assert file.suffix != ".safetensors" or file.stat().st_size <= SHARD_BYTES
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["quantization"] == {
        "weights": "fp8",
        "tables": "fp8",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    assert ModelConfig.from_file(saved / "config.json") == small.config
    generation = json.loads((saved / "generation_config.json").read_text(encoding="utf-8"))
    assert set(generation["eos_token_id"]) == small.tokenizer.stop_token_ids


def test_single_shard_and_provenance(small: Trained, tmp_path: Path) -> None:
    save(tmp_path / "c", small)
    assert [f.name for f in (tmp_path / "c").glob("model*")] == ["model.safetensors"]
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.manifest.provenance == PROVENANCE
    assert set(checkpoint.state.tables) == {"layers.1.engram.table.weight"}


def test_table_larger_than_a_shard(small: Trained, tmp_path: Path) -> None:
    save(tmp_path / "c", small, max_shard_bytes=40_000)
    load_state(tmp_path / "c")
    assert max(f.stat().st_size for f in (tmp_path / "c").glob("*.safetensors")) <= 40_000


def test_tokenizer_by_directory(small: Trained, saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "c", small, tokenizer=saved)
    assert load_model(tmp_path / "c")[1].encode("fox") == small.tokenizer.encode("fox")
    with pytest.raises(TokenizerError):
        save(tmp_path / "c", small, tokenizer=tmp_path)


def test_loading_leaves_the_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(3)
    load_model(saved)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def nan(state: dict[str, torch.Tensor]) -> None:
    state["norm.weight"] = torch.full_like(state["norm.weight"], float("nan"))


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["norm.weight"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["more.weight"] = torch.zeros(3)


def transpose(state: dict[str, torch.Tensor]) -> None:
    state["layers.0.ffn.w1.weight"] = state["layers.0.ffn.w1.weight"].T


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, r"cannot store tensor norm\.weight: it must be finite"),
        (drop, r"the state to save: tensor norm\.weight is missing"),
        (add, r"the state to save: tensor more\.weight is unknown"),
        (transpose, r"w1\.weight must have shape \[128, 64\], got \[64, 128\]"),
    ],
)
def test_bad_state_replaces_nothing(
    small: Trained,
    copy: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    state = dict(small.model.state_dict())
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(copy, state, small.config, tokenizer=small.tokenizer, provenance=PROVENANCE)
    load_state(copy)
    assert os.listdir(copy.parent) == ["copy"]


def test_missing_provenance(small: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="provenance must have the key 'licences'"):
        save(tmp_path / "c", small, provenance={"sources": []})
    with pytest.raises(CheckpointError, match="provenance must be JSON data"):
        save(tmp_path / "c", small, provenance={**PROVENANCE, "commit": object()})
    assert os.listdir(tmp_path) == []


def test_tokenizer_that_does_not_fit(small: Trained, tmp_path: Path) -> None:
    state, config = small.model.state_dict(), small.config
    assert config.engram is not None
    engram = dataclasses.replace(config.engram, engram_compressed_vocab_size=77)
    for wrong, message in (
        (dataclasses.replace(config, engram=engram), "engram_compressed_vocab_size 77"),
        (dataclasses.replace(config, vocab_size=999), "vocab_size 999"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(
                tmp_path / "c", state, wrong, tokenizer=small.tokenizer, provenance=PROVENANCE
            )


def test_full_disk_leaves_the_old_checkpoint(small: Trained, copy: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writing beyond is an OSError
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save(copy, small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    load_state(copy)
    assert os.listdir(copy.parent) == ["copy"]

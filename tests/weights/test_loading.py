from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from weights.conftest import PROVENANCE

from model1.errors import CheckpointError, ConfigError, DeviceError, TokenizerError
from model1.tokenizer import train_tokenizer
from model1.weights import (
    default_checkpoint,
    load_model,
    load_state,
    load_tensors,
    loading,
    save_tensors,
)
from model1.weights.manifest import write_manifest

MATRIX = "layers.0.ffn.w1.weight"
TABLE = "layers.1.engram.table.weight"


def shard_with(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return directory / index["weight_map"][name]


def edit_shard(
    directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> str:
    """Rewrite the shard that holds `name`, index and manifest included; returns its file name."""
    path = shard_with(directory, name)
    tensors = load_tensors(path)
    before = set(tensors)
    change(tensors)
    save_tensors(path, tensors)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    for gone in before - set(tensors):
        del index["weight_map"][gone]
    index["weight_map"].update(dict.fromkeys(tensors, path.name))
    index_path.write_text(json.dumps(index), encoding="utf-8")
    write_manifest(directory, PROVENANCE)
    return path.name


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    write_manifest(directory, PROVENANCE)


@pytest.mark.parametrize("load", [load_model, load_state])
@pytest.mark.parametrize("suffix", ["*.safetensors", "config.json", "tokenizer.json", "*.jinja"])
def test_flipped_byte(copy: Path, suffix: str, load: Callable[[Path], object]) -> None:
    path = sorted(copy.glob(suffix))[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path.name} is altered"):
        load(copy)


def test_truncated_shard(copy: Path) -> None:
    path = shard_with(copy, MATRIX)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        load_model(copy)
    write_manifest(copy, PROVENANCE)  # a manifest made of the broken files does not help
    with pytest.raises(CheckpointError, match=f"{path.name} is not a readable safetensors file"):
        load_model(copy)


def test_dropped_shard(copy: Path) -> None:
    path = shard_with(copy, MATRIX)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        load_model(copy)
    write_manifest(copy, PROVENANCE)
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        load_model(copy)


@pytest.mark.parametrize("name", [MATRIX, TABLE, "norm.weight", "layers.0.mhc_attn.fn"])
def test_swapped_dtype(copy: Path, name: str) -> None:
    file = edit_shard(copy, name, lambda t: t.update({name: t[name].float().half()}))
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {name}: .*float16"):
        load_model(copy)


def test_float_as_integer(copy: Path) -> None:
    file = edit_shard(
        copy, "norm.weight", lambda t: t.update({"norm.weight": t["norm.weight"].int()})
    )
    with pytest.raises(CheckpointError, match=rf"{file}: tensor norm.weight must be torch.float32"):
        load_model(copy)


def test_extra_tensor(copy: Path) -> None:
    file = edit_shard(copy, MATRIX, lambda t: t.update(sneaky=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=f"{file}: tensor sneaky is unknown to the model"):
        load_model(copy)


def test_extra_tensor_that_the_index_does_not_list(copy: Path) -> None:
    path = shard_with(copy, MATRIX)
    save_tensors(path, load_tensors(path) | {"sneaky": torch.zeros(2)})
    write_manifest(copy, PROVENANCE)
    with pytest.raises(CheckpointError, match=f"{path.name} holds the unlisted tensor sneaky"):
        load_model(copy)


def test_missing_tensor(copy: Path) -> None:
    edit_shard(copy, "norm.weight", lambda t: t.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"copy: tensor norm\.weight is missing"):
        load_model(copy)


@pytest.mark.parametrize("name", [TABLE, "norm.weight"])
def test_wrong_shape(copy: Path, name: str) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("", "_scale"):
            if name + end in tensors:
                tensors[name + end] = tensors[name + end][:-1]

    file = edit_shard(copy, name, shorten)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {name} must have shape \["):
        load_model(copy)


def test_config_of_another_size(copy: Path) -> None:
    edit_config(copy, lambda c: c.update(intermediate_size=256))
    with pytest.raises(CheckpointError, match=r"w1\.weight must have shape \[256, 64\]"):
        load_model(copy)


def test_without_a_quantization_object_everything_must_be_fp32(copy: Path) -> None:
    edit_config(copy, lambda c: c.pop("quantization"))
    with pytest.raises(CheckpointError, match="must be stored as"):
        load_model(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(hidden_sise=64), r"config\.json: unknown config key hidden_sise"),
        (lambda c: c.pop("vvpa"), r"config\.json: missing config key vvpa"),
        (lambda c: c.update(model_type="llama"), "model_type must be 'model1', got 'llama'"),
        (lambda c: c.update(quantization=1), "quantization must be an object, got 1"),
        (lambda c: c["quantization"].update(bits=3), "unknown config key quantization.bits"),
        (lambda c: c.update(hidden_size="64"), "hidden_size must be int, got '64'"),
    ],
)
def test_strict_config(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(ConfigError, match=message):
        load_model(copy)


def test_config_that_is_not_text(copy: Path) -> None:
    (copy / "config.json").write_bytes(b'{"model_type": "\xff"}')
    write_manifest(copy, PROVENANCE)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON in UTF-8"):
        load_model(copy)


def test_config_with_another_compressed_vocabulary(copy: Path) -> None:
    edit_config(copy, lambda c: c["engram"].update(engram_compressed_vocab_size=10))
    with pytest.raises(CheckpointError, match="config says engram_compressed_vocab_size 10"):
        load_model(copy)


def test_foreign_tokenizer(copy: Path) -> None:
    train_tokenizer(["Other words entirely."] * 4, vocab_size=275).save(copy)
    write_manifest(copy, PROVENANCE)
    with pytest.raises(CheckpointError, match="the tokenizer has 275 entries"):
        load_model(copy)


def test_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    write_manifest(copy, PROVENANCE)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_model(copy)


def test_absent_device(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device cuda is absent"):
        load_model(saved, device="cuda")


def test_model_that_does_not_fit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model1.weights.device._available_ram_bytes", lambda: 900_000)
    with pytest.raises(DeviceError, match=r"needs about .* GB on cpu, 0\.00 GB are free"):
        load_model(saved)


def test_dtype_that_no_model_runs_in(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"got torch\.float16"):
        load_model(saved, dtype=torch.float16)


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        load_model(tmp_path / "nowhere")


def test_default_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "model1" / "weights" / "loading.py"))
    with pytest.raises(CheckpointError, match="pass the path of a checkpoint directory"):
        default_checkpoint()
    (tmp_path / "checkpoints" / "code_small").mkdir(parents=True)
    assert default_checkpoint() == tmp_path / "checkpoints" / "code_small"


@pytest.mark.gpu
def test_cuda(saved: Path) -> None:
    model, _ = load_model(saved, device="cuda")
    ids = torch.arange(40, device="cuda")[None]
    assert model.embed.weight.dtype == torch.bfloat16
    reference, _ = load_model(saved)
    with torch.no_grad():
        difference = model(ids).cpu() - reference(ids.cpu())
    assert float(difference.norm() / reference(ids.cpu()).norm()) < 0.1

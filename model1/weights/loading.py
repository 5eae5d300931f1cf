"""Reading a checkpoint: everything is checked before anything is used.

Order of checks: every file against MANIFEST.json, config.json key by key, the tokenizer against
the config, then name, dtype, scale and shape of every tensor against the model that the config
describes. The first fault ends the load with one sentence that names file and tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.errors import CheckpointError, ConfigError
from model1.nn.engram import EngramTable
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.weights.checkpoint import CONFIG_NAME
from model1.weights.device import check_fit, default_dtype, resolve_device
from model1.weights.formats import (
    StorageFormats,
    StoredState,
    decode_state,
    dequantize_rows,
    tensor_kind,
)
from model1.weights.manifest import Manifest, read_json, verify_manifest
from model1.weights.match import build_model, check_specs, check_tokenizer, spec_of
from model1.weights.tensors import load_shards

_CPU = torch.device("cpu")


class Checkpoint(NamedTuple):
    """A checked checkpoint in memory, tables still quantised."""

    config: ModelConfig
    formats: StorageFormats
    tokenizer: Tokenizer
    state: StoredState
    manifest: Manifest


def default_checkpoint() -> Path:
    """The checkpoint that ships with the source tree; CheckpointError if this install has none."""
    path = Path(__file__).resolve().parents[2] / "checkpoints" / "code_small"
    if not path.is_dir():
        raise CheckpointError(
            f"no shipped checkpoint at {path}: pass the path of a checkpoint directory"
        )
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check all of a checkpoint directory without building the model.

    Raises CheckpointError naming file and tensor for anything missing, truncated, altered, extra
    or of the wrong dtype or shape; ConfigError for a wrong config.json; TokenizerError.
    """
    directory = Path(path)
    manifest = verify_manifest(directory)
    config, formats = _read_config(directory / CONFIG_NAME)
    tokenizer = Tokenizer.from_dir(directory)
    check_tokenizer(config, tokenizer)
    check_fit(sum(num_bytes for num_bytes, _ in manifest.files.values()), _CPU)
    shards = load_shards(directory)
    state = decode_state(shards, formats)
    found = {
        name: spec_of(entry) for name, entry in [*state.tensors.items(), *state.tables.items()]
    }
    check_specs(found, config, tokenizer, lambda name: str(shards.files.get(name, directory)))
    return Checkpoint(config, formats, tokenizer, state, manifest)


def load_state(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and all tensors, tables included, by the model's names; floats come as fp32.

    Raises as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.state.tensors.items()
    }
    tables = {name: dequantize_rows(store) for name, store in checkpoint.state.tables.items()}
    return checkpoint.config, tensors | tables


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Model, Tokenizer]:
    """Build the model of a checkpoint directory for inference; returns it with its tokenizer.

    dtype (torch.float32 or torch.bfloat16) is that of the matrices; None means fp32 on the CPU
    and bf16 on CUDA. Norms, gates, sinks and mixing weights stay fp32. Engram tables stay
    quantised. Raises as `read_checkpoint`, and DeviceError if the device is absent or too small.
    """
    target = resolve_device(device)
    dtype = dtype or default_dtype(target)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    check_fit(_start_bytes(state), _CPU)
    check_fit(_model_bytes(state, dtype), target)
    model = build_model(checkpoint.config, checkpoint.tokenizer)
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name in state.tables:
            table = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(table, EngramTable)
            table.set_rows(state.tables[name].to(target))
        else:
            parameter.data = _in_memory(name, state.tensors[name], dtype)
    return model.to(target).eval(), checkpoint.tokenizer


def _read_config(path: Path) -> tuple[ModelConfig, StorageFormats]:
    data = read_json(path)
    try:
        formats = StorageFormats.from_dict(data.pop("quantization", None))
        return ModelConfig.from_dict(data), formats
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _in_memory(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype it has in a running model."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype if tensor_kind(name, tensor.shape) == "matrix" else torch.float32)


def _start_bytes(state: StoredState) -> int:
    """What the model takes on the CPU while it is built: fp32, tables included."""
    tables = sum(store.num_rows * store.dim for store in state.tables.values())
    return 4 * (tables + sum(tensor.numel() for tensor in state.tensors.values()))


def _model_bytes(state: StoredState, dtype: torch.dtype) -> int:
    """What the loaded model takes on its device."""
    tables = sum(store.nbytes for store in state.tables.values())
    return tables + sum(
        tensor.numel() * (dtype.itemsize if tensor_kind(name, tensor.shape) == "matrix" else 4)
        for name, tensor in state.tensors.items()
    )

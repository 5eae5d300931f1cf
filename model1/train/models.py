"""Building the model that a run trains, and loading one that a run has written."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from model1 import presets
from model1.config import ModelConfig
from model1.errors import ConfigError, DeviceError
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.baseline import MODEL_TYPE, PlainConfig, PlainTransformer, match_parameters
from model1.train.checkpoint import load_weights, read_json
from model1.train.config import ModelSection, TrainConfig

SWITCHABLE = ("engram", "mhc", "moe", "sparse")


def resolve_device(name: str) -> torch.device:
    """The device by name. Errors: `DeviceError` when "cuda" is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but this machine has no usable CUDA GPU")
    return torch.device(name)


def preset_config(name: str, tokenizer: Tokenizer, switch_off: tuple[str, ...] = ()) -> ModelConfig:
    """A preset fitted to a tokenizer: its vocabulary sizes replace the preset's.

    Parts named in `switch_off` are set to None. Errors: `ConfigError` for unknown names.
    """
    function = getattr(presets, name, None)
    if name.startswith("_") or not callable(function):
        raise ConfigError(f"model.preset must name a function of model1.presets, got {name!r}")
    vocabulary = {
        "vocab_size": tokenizer.vocab_size,
        "compressed_vocab_size": int(tokenizer.compression_table().max()) + 1,
    }
    accepted = inspect.signature(function).parameters
    config = cast(ModelConfig, function(**{k: v for k, v in vocabulary.items() if k in accepted}))
    changes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if config.engram is not None:
        changes["engram"] = dataclasses.replace(
            config.engram,
            engram_compressed_vocab_size=vocabulary["compressed_vocab_size"],
            engram_pad_token_id=tokenizer.pad_token_id,
        )
    for part in switch_off:
        if part not in SWITCHABLE:
            raise ConfigError(f"switch_off must name one of {list(SWITCHABLE)}, got {part!r}")
        changes[part] = None
    return dataclasses.replace(config, **changes)


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> nn.Module:
    """The model of a run on the CPU in fp32, initialised from the run's seed."""
    torch.manual_seed(config.seed)
    section = config.model
    if section.init_from is not None:
        return load_trained(Path(section.init_from), tokenizer, attention=section.attention)
    if section.kind == "plain":
        shape = match_parameters(
            section.num_parameters or _preset_parameters(section, tokenizer),
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=config.data.seq_len,
        )
        torch.manual_seed(config.seed)  # counting a preset's parameters has drawn numbers
        return PlainTransformer(shape, attention=section.attention)
    assert section.preset is not None
    return new_model(preset_config(section.preset, tokenizer, section.switch_off), tokenizer)


def new_model(config: ModelConfig, tokenizer: Tokenizer) -> Model:
    """A freshly initialised Model1."""
    table = tokenizer.compression_table() if config.engram is not None else None
    return Model(config, compression_table=table)


def _preset_parameters(section: ModelSection, tokenizer: Tokenizer) -> int:
    assert section.preset is not None
    model = new_model(preset_config(section.preset, tokenizer), tokenizer)
    return model.num_parameters()["total"]


def load_trained(folder: Path, tokenizer: Tokenizer, *, attention: str = "sdpa") -> nn.Module:
    """The model of a training checkpoint on the CPU. Errors: `CheckpointError`, `ConfigError`."""
    data = read_json(folder / "config.json")
    if data.get("model_type") == MODEL_TYPE:
        model: nn.Module = PlainTransformer(PlainConfig.from_dict(data), attention=attention)  # type: ignore[arg-type]
    else:
        model = new_model(ModelConfig.from_dict(data), tokenizer)
    vocab_size = cast(Any, model).config.vocab_size
    if vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"the model of {folder} has vocab_size {vocab_size}, the tokenizer "
            f"{tokenizer.vocab_size}"
        )
    load_weights(folder, model)
    return model

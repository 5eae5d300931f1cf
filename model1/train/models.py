"""Building the model that a run trains, and loading one that a run has written."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from model1 import presets
from model1.config import ModelConfig, VvpaConfig, YarnConfig
from model1.errors import ConfigError
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.baseline import (
    MODEL_TYPE,
    PlainAttention,
    PlainConfig,
    PlainTransformer,
    match_parameters,
)
from model1.train.checkpoint import copy_tensors, load_weights, model_tensors
from model1.train.config import ModelSection, TrainConfig
from model1.weights import load_state, verify_manifest
from model1.weights.manifest import read_json

AnyConfig = TypeVar("AnyConfig", ModelConfig, PlainConfig)
SWITCHABLE = ("engram", "mhc", "moe", "sparse", "vvpa")


def preset_config(name: str, tokenizer: Tokenizer, switch_off: tuple[str, ...] = ()) -> ModelConfig:
    """A preset fitted to a tokenizer: its vocabulary sizes replace the preset's.

    Parts named in `switch_off` are left out. Errors: `ConfigError` for unknown names.
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
        changes[part] = None if part != "vvpa" else _without_vvpa(config.vvpa)
    return dataclasses.replace(config, **changes)


def _without_vvpa(vvpa: VvpaConfig) -> VvpaConfig:
    return dataclasses.replace(
        vvpa, rotary_value=False, output_gate=False, log_temperature=False, yarn=None
    )


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> nn.Module:
    """The model of a run on the CPU in fp32, initialised from the run's seed."""
    model = _build_model(config, tokenizer)
    if isinstance(model, Model):
        model.dense_attention = config.model.dense_attention
    return model


def _build_model(config: TrainConfig, tokenizer: Tokenizer) -> nn.Module:
    torch.manual_seed(config.seed)
    section = config.model
    if section.init_from is not None:
        trained = load_trained(Path(section.init_from), tokenizer, attention=section.attention)
        return _stretched(trained, section, tokenizer)
    if section.kind == "plain":
        shape = match_parameters(
            section.num_parameters or _preset_parameters(section, tokenizer),
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=config.data.seq_len,
        )
        torch.manual_seed(config.seed)  # counting a preset's parameters has drawn numbers
        return PlainTransformer(shape, attention=section.attention)
    assert section.preset is not None
    chosen = preset_config(section.preset, tokenizer, section.switch_off)
    if section.single_pass:
        chosen = _in_one_pass(chosen)
    return new_model(chosen, tokenizer)


def _in_one_pass(config: ModelConfig) -> ModelConfig:
    if config.mhc is None:
        raise ConfigError("model.single_pass needs hyper-connections, the preset has none")
    return dataclasses.replace(config, mhc=dataclasses.replace(config.mhc, single_pass=True))


def _stretched(model: nn.Module, section: ModelSection, tokenizer: Tokenizer) -> nn.Module:
    """The same weights under YaRN frequencies, where the run asks for them."""
    if section.yarn_factor is None:
        return model
    if not isinstance(model, Model) or section.yarn_original_length is None:
        raise ConfigError(
            "model.yarn_factor needs a checkpoint of kind 'model1' and model.yarn_original_length"
        )
    yarn = YarnConfig(
        factor=section.yarn_factor,
        original_max_position_embeddings=section.yarn_original_length,
        beta_fast=32.0,  # arXiv 2309.00071
        beta_slow=1.0,
    )
    vvpa = dataclasses.replace(model.config.vvpa, yarn=yarn)
    stretched = new_model(dataclasses.replace(model.config, vvpa=vvpa), tokenizer)
    stretched.load_state_dict(model.state_dict())
    return stretched


def new_model(config: ModelConfig, tokenizer: Tokenizer) -> Model:
    """A freshly initialised Model1."""
    table = tokenizer.compression_table() if config.engram is not None else None
    return Model(config, compression_table=table)


def _preset_parameters(section: ModelSection, tokenizer: Tokenizer) -> int:
    assert section.preset is not None
    model = new_model(preset_config(section.preset, tokenizer), tokenizer)
    return model.num_parameters()["total"]


def load_trained(
    folder: Path, tokenizer: Tokenizer, *, attention: PlainAttention = "sdpa"
) -> nn.Module:
    """The model of a checkpoint folder, fp32 and trainable, on the CPU.

    Reads what a run has written and any checkpoint of `model1.weights`, whose quantised matrices
    and tables become fp32. Errors: `CheckpointError`, `ConfigError`.
    """
    data = read_json(folder / "config.json")
    if "quantization" in data:
        config, stored = load_state(folder)
        model: nn.Module = new_model(_fitting(config, tokenizer, folder), tokenizer)
        state = {n: t.float() if t.is_floating_point() else t for n, t in stored.items()}
        copy_tensors(state, model_tensors(model), folder)
        return model
    verify_manifest(folder)
    if data.get("model_type") == MODEL_TYPE:
        plain = _fitting(PlainConfig.from_dict(data), tokenizer, folder)
        model = PlainTransformer(plain, attention=attention)
    else:
        model = new_model(_fitting(ModelConfig.from_dict(data), tokenizer, folder), tokenizer)
    load_weights(folder, model)
    return model


def _fitting(config: AnyConfig, tokenizer: Tokenizer, folder: Path) -> AnyConfig:
    if config.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"the model of {folder} has vocab_size {config.vocab_size}, "
            f"the tokenizer {tokenizer.vocab_size}"
        )
    return config

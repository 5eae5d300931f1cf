"""A small real model with its tokenizer, and one saved checkpoint to copy and damage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model1.config import ModelConfig
from model1.nn.model import Model
from model1.presets import tiny, tiny_v32
from model1.tokenizer import Tokenizer, train_tokenizer
from model1.weights import save_checkpoint

PROVENANCE = {
    "sources": ["a poem"],
    "licences": {"a poem": "CC0-1.0"},
    "command": "model1 train poem.toml",
    "commit": "0" * 40,
}
SHARD_BYTES = 200_000  # three shards or more


@dataclass(frozen=True)
class Trained:
    """What a training run would hand over."""

    model: Model
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The quick brown fox jumps over the lazy dog. "] * 4, vocab_size=290)


def trained(tokenizer: Tokenizer, form: str) -> Trained:
    table = tokenizer.compression_table()
    preset = {"model1": tiny, "v32": tiny_v32}[form]
    config = preset(vocab_size=tokenizer.vocab_size, compressed_vocab_size=int(table.max()) + 1)
    torch.manual_seed(1)
    model = Model(config, compression_table=table).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero initialisation would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return Trained(model, tokenizer)


@pytest.fixture(scope="session", params=["model1", "v32"])
def any_trained(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Trained:
    """Both forms of attention, together every part of the architecture."""
    return trained(tokenizer, request.param)


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer) -> Trained:
    return trained(tokenizer, "model1")


@pytest.fixture(scope="session")
def saved(small: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded FP8 checkpoint; do not write to it."""
    return save_checkpoint(
        tmp_path_factory.mktemp("saved") / "tiny",
        small.model.state_dict(),
        small.config,
        tokenizer=small.tokenizer,
        provenance=PROVENANCE,
        max_shard_bytes=SHARD_BYTES,
    )


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))

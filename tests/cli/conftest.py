"""A tiny checkpoint with random weights: every verb runs on it for real."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model1.nn.model import Model
from model1.presets import tiny
from model1.tokenizer import train_tokenizer
from model1.weights import save_checkpoint

PROVENANCE = {"sources": ["a line"], "licences": {}, "command": "none", "commit": "0" * 40}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: do not write to it."""
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n"] * 4, vocab_size=300)
    table = tokenizer.compression_table()
    config = tiny(vocab_size=tokenizer.vocab_size, compressed_vocab_size=int(table.max()) + 1)
    torch.manual_seed(1)
    model = Model(config, compression_table=table)
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    return save_checkpoint(
        folder, model.state_dict(), config, tokenizer=tokenizer, provenance=PROVENANCE
    )


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The verbs set up logging for a process of their own."""
    handlers, level = logging.root.handlers[:], logging.root.level
    uvicorn_level = logging.getLogger("uvicorn").level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(uvicorn_level)

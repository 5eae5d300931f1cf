"""Do these tensors and this tokenizer belong to the model that a config describes?

Asked before a checkpoint is written and again after it is read, so that neither an unusable one
replaces a good one nor a foreign one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.errors import CheckpointError
from model1.nn.model import Model
from model1.ops.engram.rows import RowStore
from model1.tokenizer import Tokenizer


class Spec(NamedTuple):
    """Shape and dtype of one tensor of a model."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def spec_of(entry: Tensor | RowStore) -> Spec:
    """The spec of a tensor; of stored rows that of the table they stand for."""
    if isinstance(entry, RowStore):
        return Spec((entry.num_rows, entry.dim), torch.float32)
    return Spec(tuple(entry.shape), entry.dtype)


def build_model(config: ModelConfig, tokenizer: Tokenizer) -> Model:
    """A model with random weights; the caller's random numbers do not depend on it."""
    table: np.ndarray | None = None
    if config.engram is not None:
        table = tokenizer.compression_table()
    with torch.random.fork_rng(devices=[]):
        return Model(config, compression_table=table)


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError unless vocabulary and Engram compression are those of the config.

    Every hash multiplier depends on the number of compressed ids, so a tokenizer that compresses
    otherwise would read the wrong rows without any other sign.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the config says "
            f"vocab_size {config.vocab_size}"
        )
    if config.engram is None:
        return
    compressed = int(tokenizer.compression_table().max()) + 1
    if compressed != config.engram.engram_compressed_vocab_size:
        raise CheckpointError(
            f"the tokenizer compresses to {compressed} ids, the config says "
            f"engram_compressed_vocab_size {config.engram.engram_compressed_vocab_size}"
        )


def check_specs(
    found: Mapping[str, Spec],
    config: ModelConfig,
    tokenizer: Tokenizer,
    where: Callable[[str], str],
) -> None:
    """Names, shapes and kinds (float, or one integer dtype) must be the model's, no more, no less.

    where(name) says in messages what holds the tensor. Raises CheckpointError naming the first
    tensor at fault.
    """
    with torch.device("meta"):
        model = build_model(config, tokenizer)
    wanted = {name: spec_of(tensor) for name, tensor in model.state_dict().items()}
    for name in sorted(set(wanted) ^ set(found)):
        fault = "is missing" if name in wanted else "is unknown to the model of the config"
        raise CheckpointError(f"{where(name)}: tensor {name} {fault}")
    for name, (shape, dtype) in found.items():
        if shape != wanted[name].shape:
            raise CheckpointError(
                f"{where(name)}: tensor {name} must have shape {list(wanted[name].shape)}, "
                f"got {list(shape)}"
            )
        both_float = dtype.is_floating_point and wanted[name].dtype.is_floating_point
        if not both_float and dtype != wanted[name].dtype:
            raise CheckpointError(
                f"{where(name)}: tensor {name} must be {wanted[name].dtype}, got {dtype}"
            )

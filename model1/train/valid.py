"""A quick look at held-out text during training; `model1.evals.bits_per_byte` is the real one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from model1.train.config import DataSection
from model1.train.data import PackedRows, RowStream, TokenCache
from model1.train.loss import IGNORE, Trainable, chunked_cross_entropy

VALID_SEED = 0  # the same rows for every run, whatever its own seed
CHUNK_TOKENS = 16384


@torch.no_grad()
def held_out_loss(
    trainable: Trainable,
    model: nn.Module,
    cache: TokenCache,
    data: DataSection,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Mean cross-entropy (nats per token) over fixed packed rows, and about how many bits per byte.

    The estimate takes the average bytes per token of the whole held-out text and leaves out first
    tokens of documents. Whole micro-batches only, so that a compiled model sees its own shape.
    """
    stream = RowStream(PackedRows(cache, data.seq_len, VALID_SEED), None, 0.0)
    size = data.micro_batch_rows
    model.eval()
    total, count = torch.zeros((), device=device), 0
    for first in range(0, max(data.valid_rows // size, 1) * size, size):
        batch = stream.batch(first, size)
        count += int((batch.targets != IGNORE).sum())
        batch = batch.to(device)
        with autocast():
            hidden, _ = trainable.forward_hidden(batch.input_ids, doc_starts=batch.doc_starts)
            weight = trainable.output_weight
            flat = hidden.flatten(0, 1), weight, batch.targets.flatten()
            total += chunked_cross_entropy(*flat, CHUNK_TOKENS)
    model.train()
    nats = float(total) / max(count, 1)
    return {
        "valid_cross_entropy": nats,
        "valid_bits_per_byte": nats / math.log(2) / cache.bytes_per_token,
    }

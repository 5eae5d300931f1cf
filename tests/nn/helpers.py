"""Small models with every weight moved off its neutral start, and hand-built engine steps."""

from __future__ import annotations

import numpy as np
import torch

from model1.config import ModelConfig
from model1.nn.metadata import AttentionMetadata
from model1.nn.model import Model


def compression(config: ModelConfig) -> np.ndarray | None:
    """A many-to-one table onto the configured number of compressed ids."""
    if config.engram is None:
        return None
    return np.arange(config.vocab_size) % config.engram.engram_compressed_vocab_size


def build(config: ModelConfig, *, seed: int = 0, noise: float = 0.1) -> Model:
    """An eval-mode model whose zero- and one-initialised weights carry noise.

    Without it the gates, slopes, sinks and output projections would be neutral and a test on the
    whole model could not see them.
    """
    torch.manual_seed(seed)
    model = Model(config, compression_table=compression(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "basis" not in name and "table" not in name:
                parameter.add_(torch.randn_like(parameter) * noise)
    return model


def step_metadata(
    chunks: list[tuple[list[int], int, int]],
    *,
    block_size: int,
    blocks: list[list[int]],
    ngram: int,
) -> AttentionMetadata:
    """One step; per request: its whole history, tokens already cached, tokens of this step."""
    ids, positions, windows, slots, lens, totals = [], [], [], [], [], []
    for (history, start, count), table in zip(chunks, blocks, strict=True):
        for p in range(start, start + count):
            ids.append(history[p])
            positions.append(p)
            windows.append([history[p - i] if p >= i else -1 for i in range(ngram)])
            slots.append(table[p // block_size] * block_size + p % block_size)
        lens.append(count)
        totals.append(start + count)
    width = max(len(table) for table in blocks)
    padded = [table + [-1] * (width - len(table)) for table in blocks]
    return AttentionMetadata(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        ngram_token_ids=torch.tensor(windows),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(padded, dtype=torch.int32),
        query_lens=tuple(lens),
        cache_seqlens=tuple(totals),
        logits_rows=torch.arange(len(ids)),
    )

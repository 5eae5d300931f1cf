"""Runs the model on one planned step: host lists to tensors, forward, logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model1.engine.config import EngineConfig, fit_num_blocks
from model1.engine.scheduler import ScheduledRequest
from model1.nn.metadata import AttentionMetadata

if TYPE_CHECKING:
    from model1.nn.model import Model

logger = logging.getLogger(__name__)

# A CPU step of at most this many tokens runs on one thread: its many small operations gain nothing
# from a second one, and on a busy machine waiting for it costs far more than the step.
ONE_THREAD_TOKENS = 16


class ModelRunner:
    """Owns the KV cache. `config` must be resolved; its device is where the model already is."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        if config.kv_cache_dtype == "auto":
            raise AssertionError("ModelRunner needs a resolved config")
        model.check_backend(config.backend)
        self._model, self._backend = model.eval(), config.backend
        self._device = next(model.parameters()).device
        self._num_threads = torch.get_num_threads()
        self._block_size = config.block_size
        engram = model.config.engram
        self._ngram_size = 1 if engram is None else engram.engram_max_ngram_size
        kind = config.kv_cache_dtype
        probe = model.allocate_kv_cache(1, config.block_size, kind)
        num_blocks = fit_num_blocks(
            config,
            bytes_per_token=probe.bytes_per_token,
            budget_bytes=_budget_bytes(config, self._device),
        )
        self._kv_cache = model.allocate_kv_cache(num_blocks, config.block_size, kind)
        logger.info(
            "kv cache: %d blocks of %d tokens, %s, %d bytes per token",
            num_blocks,
            config.block_size,
            kind,
            probe.bytes_per_token,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache, as measured."""
        return self._kv_cache.num_blocks

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token, all layers."""
        return self._kv_cache.bytes_per_token

    @torch.inference_mode()
    def forward(self, step: Sequence[ScheduledRequest]) -> Tensor:
        """Logits [n, v] float32 of the requests with `needs_logits`, in the order of the step."""
        if self._device.type == "cpu":
            tokens = sum(part.num_new_tokens for part in step)
            torch.set_num_threads(1 if tokens <= ONE_THREAD_TOKENS else self._num_threads)
        meta = build_metadata(
            step,
            block_size=self._block_size,
            ngram_size=self._ngram_size,
            device=self._device,
        )
        return self._model.forward_paged(meta, self._kv_cache, self._backend)


def build_metadata(
    step: Sequence[ScheduledRequest], *, block_size: int, ngram_size: int, device: torch.device
) -> AttentionMetadata:
    """Describe a step to the model; a function of token histories and block tables alone.

    One pass over the requests collects each one's new tokens behind the ngram_size - 1 tokens
    before them (-1 where there are none), so that every n-gram window is a slice of one array.
    """
    history = ngram_size - 1
    tokens: list[int] = []
    block_table = np.full((len(step), max(len(p.block_table) for p in step)), -1, dtype=np.int32)
    for i, part in enumerate(step):
        start = part.request.num_computed_tokens
        first = start - history
        tokens.extend([-1] * -first)  # empty when first >= 0
        tokens.extend(part.request.token_ids[max(first, 0) : start + part.num_new_tokens])
        block_table[i, : len(part.block_table)] = part.block_table
    query_lens = tuple(part.num_new_tokens for part in step)
    starts = np.array([part.request.num_computed_tokens for part in step], dtype=np.int64)
    lens = np.array(query_lens, dtype=np.int64)
    ends = lens.cumsum()
    rows = np.arange(ends[-1])
    request_idx = np.repeat(np.arange(len(step)), lens)
    positions = rows + (starts - ends + lens)[request_idx]
    windows = rows + history * (request_idx + 1)
    ngrams = np.array(tokens, dtype=np.int64)[windows[:, None] - np.arange(ngram_size)]
    blocks = block_table[request_idx, positions // block_size].astype(np.int64)
    wanted = [i for i, part in enumerate(step) if part.needs_logits]

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return AttentionMetadata(
        token_ids=to_device(np.ascontiguousarray(ngrams[:, 0])),
        positions=to_device(positions),
        ngram_token_ids=to_device(ngrams),
        slot_mapping=to_device(blocks * block_size + positions % block_size),
        block_table=to_device(block_table),
        query_lens=query_lens,
        cache_seqlens=tuple((starts + lens).tolist()),
        logits_rows=to_device(ends[wanted] - 1),
    )


def _budget_bytes(config: EngineConfig, device: torch.device) -> int:
    if device.type != "cuda":
        return config.kv_cache_memory_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * config.gpu_memory_utilization)

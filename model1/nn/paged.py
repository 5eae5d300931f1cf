"""One engine step over the paged cache, on the operators of one backend.

Which rows run dense follows from lengths that the host knows: nothing here waits for the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.nn.attention import AttendSpec
from model1.nn.context import frequencies, log_position
from model1.nn.indexer import core_count
from model1.nn.kv import KVCache
from model1.nn.metadata import AttentionMetadata
from model1.ops.engram import engram_short_conv
from model1.ops.kv_write import NORM_ROPE_STORE, norm_rope_store
from model1.ops.lowrank_attention import LOWRANK_ATTENTION, lowrank_attention
from model1.ops.paged_decode import PAGED_DECODE, paged_decode
from model1.ops.rope import rotation
from model1.ops.rope_gate import INVERSE_ROPE_GATE, inverse_rope_gate


def check_backend(config: ModelConfig, backend: str, device: torch.device) -> None:
    """Raise BackendUnavailable unless the backend runs every operator of a step on this device."""
    operators = [NORM_ROPE_STORE, PAGED_DECODE]
    if config.sparse is not None:
        operators.append(LOWRANK_ATTENTION)
    if config.vvpa.rotary_value or config.vvpa.output_gate:
        operators.append(INVERSE_ROPE_GATE)
    for operator in operators:
        operator.resolve(backend, device)


class Rows(NamedTuple):
    """Rows of the step that go through one operator: a piece of each of b requests, in order."""

    step_rows: Tensor | None  # [m] int64; None: all rows of the step
    block_table: Tensor  # [b, max_blocks] int32
    cache_seqlens: Tensor  # [b] int32, what the last row of each piece sees
    cu_seqlens_q: Tensor  # [b + 1] int32
    max_seqlen_q: int
    max_seqlen: int


class SparseRows(NamedTuple):
    """What rows that do not see every token exactly need besides."""

    key_end: Tensor  # [m] int32, tokens that a row sees
    core_count: Tensor  # [m] int32, how many of them exactly
    topk: int  # the largest core_count
    sliding_window: int


class PagedContext:
    """Positions, angles and cached keys of the t tokens of one engine step."""

    def __init__(
        self, config: ModelConfig, meta: AttentionMetadata, cache: KVCache, backend: str = "auto"
    ) -> None:
        self.config, self.meta, self.cache, self.backend = config, meta, cache, backend
        self.device = meta.positions.device
        # What the operators of the first layer have checked holds for all: only values differ.
        self.is_checked = False
        self.rotation = rotation(meta.positions, _frequencies(config, self.device))
        self.log_position = log_position(meta.positions, config.vvpa.reference_length)
        self.query_lens, self.cache_seqlens = (
            np.array(meta.query_lens),
            np.array(meta.cache_seqlens),
        )
        num_dense = self.query_lens
        if config.sparse is not None:
            # A request's positions ascend: its rows that see few enough tokens come first.
            room = config.sparse.dense_below - (self.cache_seqlens - self.query_lens)
            num_dense = np.clip(room, 0, self.query_lens)
        self.dense = self._rows(np.zeros_like(num_dense), num_dense)
        self.sparse = self._rows(num_dense, self.query_lens)
        self.sparse_rows = None if self.sparse is None else self._sparse_rows(self.sparse)

    def _rows(self, begin: np.ndarray, end: np.ndarray) -> Rows | None:
        """Rows begin[i] <= j < end[i] of each request's; None if there are none."""
        counts, table, index = end - begin, self.meta.block_table, None
        (kept,) = counts.nonzero()
        if len(kept) == 0:
            return None
        if len(kept) < len(counts):
            table = table.index_select(0, self._to_device(kept))
        if (counts < self.query_lens).any():
            first = np.repeat(self.query_lens.cumsum() - self.query_lens, self.query_lens)
            row = np.arange(len(first)) - first
            is_in = (row >= begin.repeat(self.query_lens)) & (row < end.repeat(self.query_lens))
            index = self._to_device(is_in.nonzero()[0])
        counts, seqlens = counts[kept], (self.cache_seqlens - self.query_lens + end)[kept]
        longest = int(seqlens.max())
        return Rows(
            index,
            table[:, : -(-longest // self.cache.block_size)],
            self._to_device(seqlens.astype(np.int32)),
            self._to_device(np.concatenate([[0], counts.cumsum()]).astype(np.int32)),
            int(counts.max()),
            longest,
        )

    def _sparse_rows(self, rows: Rows) -> SparseRows:
        sparse, window = self.config.sparse, self.config.attention.sliding_window
        assert sparse is not None
        visible = _take(self.meta.positions, rows) + 1
        topk = int(core_count(torch.tensor(rows.max_seqlen), sparse, window))
        count = core_count(visible, sparse, window)
        return SparseRows(visible.int(), count.int(), topk, min(window, topk))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def latents(self, layer_id: int, kv: Tensor, spec: AttendSpec) -> Tensor:
        """See Context; they are in the cache then, and the selector's vectors with them."""
        cache, slots, norm = self.cache, self.meta.slot_mapping, spec.kv_norm
        latents = norm_rope_store(
            kv, norm.weight, self.rotation, cache.latent[layer_id], slots,
            layout=cache.layout, block_size=cache.block_size, eps=norm.eps,
            norm_width=len(norm.weight), return_latent=spec.selector is not None,
            is_checked=self.is_checked, backend=self.backend,
        )  # fmt: skip
        if spec.selector is not None:
            index = cache.index[layer_id]
            z = spec.selector.project(latents[:, : cache.layout.d_nope])
            index.index_copy_(0, slots, z.type_as(index))
        return latents

    def attend(self, layer_id: int, q: Tensor, latents: Tensor, spec: AttendSpec) -> Tensor:
        """See Context; reads the cache."""
        parts = []
        if self.dense is not None:
            parts.append((self.dense, self._attend_dense(layer_id, q, self.dense, spec)))
        if self.sparse is not None:
            parts.append((self.sparse, self._attend_sparse(layer_id, q, self.sparse, spec)))
        if len(parts) == 1:
            return parts[0][1]
        out = q.new_empty(*q.shape[:2], spec.value_dim)
        for rows, values in parts:
            assert rows.step_rows is not None
            out.index_copy_(0, rows.step_rows, values)
        return out

    def _attend_dense(self, layer_id: int, q: Tensor, rows: Rows, spec: AttendSpec) -> Tensor:
        out, _ = paged_decode(
            _take(q, rows), self.cache.latent[layer_id], rows.block_table, rows.cache_seqlens,
            value_dim=spec.value_dim, softmax_scale=spec.softmax_scale, causal=True,
            layout=self.cache.layout, block_size=self.cache.block_size,
            cu_seqlens_q=rows.cu_seqlens_q, max_seqlen_q=rows.max_seqlen_q,
            attn_sink=spec.attn_sink, is_checked=self.is_checked, backend=self.backend,
        )  # fmt: skip
        return out

    def _attend_sparse(self, layer_id: int, q: Tensor, rows: Rows, spec: AttendSpec) -> Tensor:
        selector, sparse = spec.selector, self.sparse_rows
        assert selector is not None
        assert sparse is not None
        out, _ = lowrank_attention(
            _take(q, rows), self.cache.latent[layer_id], self.cache.index[layer_id],
            rows.block_table, rows.cu_seqlens_q, rows.max_seqlen_q,
            sparse.key_end, sparse.core_count, selector.basis, selector.mean,
            topk=sparse.topk, sliding_window=sparse.sliding_window, max_seqlen=rows.max_seqlen,
            rotary_value=selector.rotary_value, layout=self.cache.layout,
            block_size=self.cache.block_size, value_dim=spec.value_dim,
            softmax_scale=spec.softmax_scale, attn_sink=spec.attn_sink,
            is_checked=self.is_checked, backend=self.backend,
        )  # fmt: skip
        return out

    def finish_values(self, out: Tensor, gate: Tensor | None, *, is_rotary: bool) -> Tensor:
        """See Context."""
        angles = self.rotation if is_rotary else None
        d_rope = self.cache.layout.d_rope
        is_checked, self.is_checked = self.is_checked, True
        return inverse_rope_gate(
            out, angles, gate, d_rope=d_rope, is_checked=is_checked, backend=self.backend
        )

    def short_conv(
        self, layer_id: int, x: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """See Context; earlier values come from the cache."""
        window = self._conv_window(layer_id, x, weight.shape[1], dilation)
        return engram_short_conv(window, weight, norm_weight, eps=eps)

    def _conv_window(self, layer_id: int, x: Tensor, taps: int, dilation: int) -> Tensor:
        """x [t, w] and its values dilation * j tokens earlier, [t, taps, w], oldest first."""
        store, size = self.cache.conv[layer_id], self.cache.block_size
        store.index_copy_(0, self.meta.slot_mapping, x.to(store.dtype))
        back = torch.arange(taps - 1, -1, -1, device=self.device) * dilation
        position = self.meta.positions[:, None] - back
        clamped = position.clamp(min=0)
        blocks = self.meta.block_table[self._request_of_row[:, None], clamped // size].long()
        window = store[blocks * size + clamped % size].to(x.dtype)
        return window * (position >= 0).unsqueeze(-1).to(x.dtype)

    @functools.cached_property
    def _request_of_row(self) -> Tensor:
        return self._to_device(np.repeat(np.arange(len(self.query_lens)), self.query_lens))


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x if rows.step_rows is None else x.index_select(0, rows.step_rows)


@functools.lru_cache(maxsize=8)
def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    # Made once: copying them to a GPU makes the host wait.
    return frequencies(config).to(device)

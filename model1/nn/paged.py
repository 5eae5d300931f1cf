"""One engine step over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.nn.attention import AttendSpec
from model1.nn.context import attend_request, frequencies, log_position
from model1.nn.kv import KVCache
from model1.nn.metadata import AttentionMetadata
from model1.ops.dense_attention import dense_decode
from model1.ops.kv_cache import gather_and_dequantize, gather_rope, quantize_and_store
from model1.ops.rope import rotation


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Keys of one request and layer, read from the cache on demand."""

    cache: KVCache
    layer_id: int
    slots: Tensor  # [s] int64
    dtype: torch.dtype
    dense_limit: int | None

    @property
    def z(self) -> Tensor:
        """See RequestKeys."""
        return self.cache.index[self.layer_id][self.slots].to(self.dtype)

    def all(self) -> Tensor:
        """See RequestKeys."""
        return self._gather(self.slots)

    def rope(self) -> Tensor:
        """See RequestKeys."""
        return gather_rope(
            self.cache.latent[self.layer_id], self.slots,
            layout=self.cache.layout, block_size=self.cache.block_size, dtype=self.dtype,
        )  # fmt: skip

    def fetch(self, indices: Tensor) -> Tensor:
        """See RequestKeys."""
        return self._gather(torch.where(indices >= 0, self.slots[indices.clamp(min=0)], -1))

    def _gather(self, slots: Tensor) -> Tensor:
        return gather_and_dequantize(
            self.cache.latent[self.layer_id], slots,
            layout=self.cache.layout, block_size=self.cache.block_size, dtype=self.dtype,
        )  # fmt: skip


class PagedContext:
    """Positions, angles and cached keys of the t tokens of one engine step."""

    def __init__(self, config: ModelConfig, meta: AttentionMetadata, cache: KVCache) -> None:
        self.cache, self.meta = cache, meta
        self.rotation = rotation(meta.positions, frequencies(config).to(meta.positions.device))
        self.log_position = log_position(meta.positions, config.vvpa.reference_length)
        self.d_nope = config.attention.latent_nope_dim
        self.dense_limit = None if config.sparse is None else config.sparse.dense_below
        self.slots = self._request_slots()
        limit = max(meta.cache_seqlens) if self.dense_limit is None else self.dense_limit
        # Requests with one new token and a short history run as one padded batch.
        self.batched = [
            i
            for i, (new, total) in enumerate(zip(meta.query_lens, meta.cache_seqlens, strict=True))
            if new == 1 and total <= limit
        ]
        device = meta.positions.device
        seqlens = [meta.cache_seqlens[i] for i in self.batched]
        self.batched_rows = torch.tensor(self.batched, dtype=torch.int64, device=device)
        self.batched_seqlens = torch.tensor(seqlens, dtype=torch.int64, device=device)
        self.batched_slots = self.slots[self.batched_rows, : max(seqlens, default=0)]
        starts = [0]
        for new in meta.query_lens:
            starts.append(starts[-1] + new)
        self.starts = starts

    def _request_slots(self) -> Tensor:
        """Slots of every request's tokens in order, [b, max length], -1 past its end."""
        size, table = self.cache.block_size, self.meta.block_table.long()
        offsets = torch.arange(max(self.meta.cache_seqlens), device=table.device)
        slots = table[:, offsets // size] * size + offsets % size
        lengths = torch.tensor(self.meta.cache_seqlens, device=table.device)
        return slots.masked_fill(offsets >= lengths[:, None], -1)

    def attend(self, layer_id: int, q: Tensor, kv: Tensor, spec: AttendSpec) -> Tensor:
        """See Context; writes this step's latents and selector vectors first."""
        cache, meta = self.cache, self.meta
        quantize_and_store(
            kv, cache.latent[layer_id], meta.slot_mapping,
            layout=cache.layout, block_size=cache.block_size,
        )  # fmt: skip
        if spec.selector is not None:
            index = cache.index[layer_id]
            z = spec.selector.project(kv[:, : self.d_nope])
            index.index_copy_(0, meta.slot_mapping, z.to(index.dtype))
        if len(self.batched) == len(meta.query_lens):
            return self._decode(layer_id, q, spec)
        out = q.new_empty(q.shape[0], q.shape[1], spec.value_dim)
        if self.batched:
            rows = torch.tensor([self.starts[i] for i in self.batched], device=q.device)
            out[rows] = self._decode(layer_id, q[rows], spec)
        for i, total in enumerate(meta.cache_seqlens):
            if i not in self.batched:
                rows = slice(self.starts[i], self.starts[i + 1])
                keys = CachedKeys(cache, layer_id, self.slots[i, :total], q.dtype, self.dense_limit)
                key_end = meta.positions[rows] + 1
                out[rows] = attend_request(q[rows], torch.zeros_like(key_end), key_end, spec, keys)
        return out

    def _decode(self, layer_id: int, q: Tensor, spec: AttendSpec) -> Tensor:
        kv = gather_and_dequantize(
            self.cache.latent[layer_id], self.batched_slots,
            layout=self.cache.layout, block_size=self.cache.block_size, dtype=q.dtype,
        )  # fmt: skip
        return dense_decode(
            q, kv, self.batched_seqlens, value_dim=spec.value_dim,
            softmax_scale=spec.softmax_scale, attn_sink=spec.attn_sink, return_lse=False,
        )[0]  # fmt: skip

    def conv_window(self, layer_id: int, x: Tensor, taps: int, dilation: int) -> Tensor:
        """See Context; earlier values come from the cache."""
        store = self.cache.conv[layer_id]
        store.index_copy_(0, self.meta.slot_mapping, x.to(store.dtype))
        request = torch.repeat_interleave(
            torch.arange(len(self.meta.query_lens), device=x.device),
            torch.tensor(self.meta.query_lens, device=x.device),
        )
        back = torch.arange(taps - 1, -1, -1, device=x.device) * dilation
        position = self.meta.positions[:, None] - back
        slots = self.slots[request[:, None], position.clamp(min=0)]
        return store[slots].to(x.dtype) * (position >= 0).unsqueeze(-1).to(x.dtype)

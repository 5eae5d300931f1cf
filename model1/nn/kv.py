"""The paged cache of one model: latents, selector vectors and convolution inputs per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.ops.kv_cache import allocate_kv_cache
from model1.ops.kv_cache.layout import KVLayout, kv_layout

CacheKind = Literal["fp8", "bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Storage for num_blocks * block_size tokens; a token's `slot` addresses every tensor."""

    num_blocks: int
    block_size: int
    layout: KVLayout
    latent: tuple[Tensor, ...]  # per layer, uint8 [num_blocks, stride]
    index: tuple[Tensor, ...]  # per layer, [num_slots, r]; empty without sparse attention
    conv: dict[int, Tensor]  # Engram layer -> [num_slots, n * c]; only with its convolution

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one cached token over all layers, selector vectors included."""
        side = [*self.index, *self.conv.values()]
        side_bytes = sum(tensor.shape[1] * tensor.element_size() for tensor in side)
        return len(self.latent) * self.layout.bytes_per_token + side_bytes


def allocate(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    kind: CacheKind,
    device: torch.device,
) -> KVCache:
    """An empty cache. Selector vectors are fp32 beside an fp32 cache and bf16 otherwise."""
    if num_blocks < 1 or block_size < 1:
        raise ValueError(
            f"num_blocks and block_size must be positive, got {num_blocks}, {block_size}"
        )
    attention = config.attention
    layout = kv_layout(kind, attention.form, attention.latent_nope_dim, attention.qk_rope_head_dim)
    layers = range(config.num_hidden_layers)
    side_dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    num_slots = num_blocks * block_size
    index: tuple[Tensor, ...] = ()
    if config.sparse is not None:
        shape = (num_slots, config.sparse.index_rank)
        index = tuple(_zeros(shape, side_dtype, device) for _ in layers)
    conv: dict[int, Tensor] = {}
    if config.engram is not None and config.engram.short_conv:
        shape = (num_slots, config.num_streams * config.hidden_size)
        conv = {i: _zeros(shape, side_dtype, device) for i in config.engram.engram_layer_ids}
    latent = tuple(allocate_kv_cache(num_blocks, block_size, layout, device) for _ in layers)
    return KVCache(num_blocks, block_size, layout, latent, index, conv)


def _zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU pages that take memory only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)

"""Inputs of the operator benchmarks, distributed as FlashMLA's own tests draw theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.kv_cache import KVLayout, quantize_and_store

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
_POOL_TOKENS = 32768  # distinct tokens; larger caches repeat their blocks


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """scale * N(0, 1), clamped to +-1."""
    return (torch.randn(*shape, device=device) * scale).clamp_(-1.0, 1.0).to(dtype)


def paged_cache(num_blocks: int, block_size: int, layout: KVLayout, device: torch.device) -> Tensor:
    """A filled cache, uint8 [num_blocks, block stride]; its blocks repeat a pool of tokens."""
    pool_blocks = max(1, min(num_blocks, _POOL_TOKENS // block_size))
    stride = layout.block_stride_bytes(block_size)
    pool = torch.zeros(pool_blocks, stride, dtype=torch.uint8, device=device)
    num_tokens = pool_blocks * block_size
    tokens = normal(num_tokens, layout.d, dtype=torch.bfloat16, device=device, scale=0.1)
    slots = torch.arange(num_tokens, device=device)
    quantize_and_store(tokens, pool, slots, layout=layout, block_size=block_size)
    return pool[torch.randint(pool_blocks, (num_blocks,), device=device)]


def cache_view(cache: Tensor, block_size: int, layout: KVLayout) -> Tensor:
    """The same bytes as callers of FlashMLA pass them: [num_blocks, block_size, 1, token bytes]."""
    token = layout.bytes_per_token
    shape, strides = (len(cache), block_size, 1, token), (cache.stride(0), token, token, 1)
    return cache.as_strided(shape, strides).view(torch.float8_e4m3fn)


def block_tables(lengths: Tensor, block_size: int) -> tuple[Tensor, int]:
    """Blocks dealt to requests at random, [b, max_blocks] int32, and how many there are."""
    per_request = int(-(-int(lengths.max()) // block_size))
    num_blocks = len(lengths) * per_request
    order = torch.randperm(num_blocks, device=lengths.device, dtype=torch.int32)
    return order.view(len(lengths), per_request), num_blocks


def varied_lengths(b: int, mean: int, least: int, device: torch.device) -> Tensor:
    """Lengths drawn from N(mean, mean / 2), at least `least`, int32."""
    drawn = torch.randn(b, device=device) * (mean / 2) + mean
    return drawn.clamp_(least, 2 * mean).to(torch.int32)


def random_slots(lengths: Tensor, s_q: int, topk: int, table: Tensor, block_size: int) -> Tensor:
    """Slots of `topk` distinct random tokens per query, [b, s_q, topk] int32, -1 at the end."""
    rows = []
    for i, length in enumerate(lengths.tolist()):
        for _ in range(s_q):
            chosen = torch.randperm(length, device=table.device)[:topk]
            slots = table[i, chosen // block_size].long() * block_size + chosen % block_size
            rows.append(torch.nn.functional.pad(slots, (0, topk - len(slots)), value=-1))
    return torch.stack(rows).view(len(lengths), s_q, topk).to(torch.int32)

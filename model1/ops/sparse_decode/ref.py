"""Plain PyTorch sparse decode: gather, dequantise, one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model1.ops.kv_cache import KVLayout, gather_and_dequantize

# A cache, slots in which every entry that does not count is -1, and the block size.
_Scope = tuple[Tensor, Tensor, int]


def _valid_slots(
    topk_indices: Tensor, topk_length: Tensor | None, kv_cache: Tensor, block_size: int
) -> Tensor:
    """[b, s_q, topk] int32 slots in which every entry that does not count is -1."""
    last_slot = min(len(kv_cache) * block_size - 1, torch.iinfo(topk_indices.dtype).max)
    is_unused = (topk_indices < 0) | (topk_indices > last_slot)
    if topk_length is not None:
        position = torch.arange(topk_indices.shape[-1], device=topk_indices.device)
        is_unused |= position >= topk_length[:, None, None]
    return topk_indices.masked_fill(is_unused, -1)


def _gather(
    scopes: Sequence[_Scope], i: int, layout: KVLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys of request i, fp32 [s_q, keys of all scopes, d], and which of them count."""
    kv = [
        gather_and_dequantize(
            cache, slots[i], layout=layout, block_size=size, dtype=dtype, backend="ref"
        )
        for cache, slots, size in scopes
    ]
    return torch.cat(kv, dim=1).float(), torch.cat([slots[i] >= 0 for _, slots, _ in scopes], dim=1)


def sparse_decode_ref(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_topk_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    layout: KVLayout,
    block_size: int,
    extra_block_size: int,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.sparse_decode.sparse_decode`; one request at a time, sums in fp32."""
    b, s_q, h, _ = q.shape
    slots = _valid_slots(topk_indices, topk_length, kv_cache, block_size)
    scopes = [(kv_cache, slots, block_size)]
    if extra_kv_cache is not None and extra_topk_indices is not None:
        slots = _valid_slots(
            extra_topk_indices, extra_topk_length, extra_kv_cache, extra_block_size
        )
        scopes.append((extra_kv_cache, slots, extra_block_size))
    out = q.new_empty(b, s_q, h, value_dim)
    lse = q.new_empty(b, s_q, h, dtype=torch.float32)
    for i in range(b):
        kv, is_valid = _gather(scopes, i, layout, q.dtype)
        scores = torch.bmm(q[i].float(), kv.transpose(1, 2)) * softmax_scale
        scores = scores.masked_fill(~is_valid[:, None, :], float("-inf"))
        row_lse = torch.logsumexp(scores, dim=-1)
        total = row_lse if attn_sink is None else torch.logaddexp(row_lse, attn_sink)
        # a row without keys has only -inf scores: any finite denominator gives out = 0
        weights = torch.exp(scores - total.masked_fill(total == float("-inf"), 0.0)[..., None])
        out[i] = torch.bmm(weights, kv[..., :value_dim]).to(q.dtype)
        lse[i] = row_lse.masked_fill(row_lse == float("-inf"), empty_lse)
    return out, lse

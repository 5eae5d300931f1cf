"""Plain PyTorch sparse decode: gather, dequantise, one softmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    scopes: Sequence[_Scope], layout: KVLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys of some rows, fp32 [rows, keys of all scopes, d], and which of them count."""
    kv = [
        gather_and_dequantize(
            cache, slots, layout=layout, block_size=size, dtype=dtype, backend="ref"
        )
        for cache, slots, size in scopes
    ]
    return torch.cat(kv, dim=1).float(), torch.cat([slots >= 0 for _, slots, _ in scopes], dim=1)


def _passes(
    scopes: Sequence[_Scope], b: int, s_q: int, deterministic: bool
) -> Iterator[tuple[tuple[int, slice], list[_Scope]]]:
    """The rows that are computed together, by request and queries, with their slots.

    A padded or batched sum may round otherwise: deterministic rows are alone with what counts.
    """
    step = 1 if deterministic else s_q
    for i in range(b):
        for j in range(0, s_q, step):
            at = (i, slice(j, j + step))
            rows = [slots[at] for _, slots, _ in scopes]
            if deterministic:
                rows = [row[row >= 0][None] for row in rows]
            yield at, [(x[0], row, x[2]) for x, row in zip(scopes, rows, strict=True)]


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
    """See `model1.ops.sparse_decode.sparse_decode`; a request at a time, sums in fp32."""
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
    for at, chosen in _passes(scopes, b, s_q, deterministic):
        kv, is_valid = _gather(chosen, layout, q.dtype)
        # a copy lies where any allocation does, whatever the row's place in the batch
        scores = torch.bmm(q[at].float().clone(), kv.transpose(1, 2)) * softmax_scale
        scores = scores.masked_fill(~is_valid[:, None, :], float("-inf"))
        row_lse = torch.logsumexp(scores, dim=-1)
        total = row_lse if attn_sink is None else torch.logaddexp(row_lse, attn_sink)
        # a row without keys has only -inf scores: any finite denominator gives out = 0
        weights = torch.exp(scores - total.masked_fill(total == float("-inf"), 0.0)[..., None])
        out[at] = torch.bmm(weights, kv[..., :value_dim]).to(q.dtype)
        lse[at] = row_lse.masked_fill(row_lse == float("-inf"), empty_lse)
    return out, lse

"""Plain PyTorch selectors over paged caches: one request at a time, a few rows of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.dense_attention.ref import range_mask
from model1.ops.indexer.ref import scan_weights_ref, select_core_ref
from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.ref import gather_rope_ref

# Rows of queries handled at once are as many as keep the matrix of scores, 4 h s bytes a row, this
# small: up to four of its size are alive together. More rows than the limit are no faster.
SCORES_BYTES = 1 << 26
ROW_LIMIT = 64


class ScanKeys(NamedTuple):
    """The first s tokens of a request, as the low-rank scan sees them."""

    z: Tensor  # [s, r]
    rope: Tensor  # [s, d_rope]


def request_rows(
    cu_seqlens_q: Tensor, key_end: Tensor, h: int
) -> Iterator[tuple[int, int, list[tuple[slice, int]]]]:
    """Every request that sees a key: its number, its keys, and its rows in chunks with theirs."""
    for request, (first, last) in enumerate(pairwise(cu_seqlens_q.tolist())):
        total = int(key_end[first:last].max()) if first < last else 0
        if total <= 0:
            continue
        step = min(ROW_LIMIT, max(1, SCORES_BYTES // (4 * h * total)))
        chunks = []
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            num_keys = int(key_end[rows].max())
            if num_keys > 0:
                chunks.append((rows, num_keys))
        yield request, total, chunks


def request_slots(block_table: Tensor, request: int, num_keys: int, block_size: int) -> Tensor:
    """Slots of a request's first tokens, [num_keys] int64."""
    position = torch.arange(num_keys, device=block_table.device)
    return block_table[request].long()[position // block_size] * block_size + position % block_size


def scan_keys(
    slots: Tensor, index_cache: Tensor, kv_cache: Tensor, *, layout: KVLayout, block_size: int,
    dtype: torch.dtype,
) -> ScanKeys:  # fmt: skip
    """What the caches hold at these slots, in `dtype`."""
    rope = gather_rope_ref(kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype)
    return ScanKeys(index_cache.index_select(0, slots).to(dtype), rope)


def scan_scores(scan_q: Tensor, keys: ScanKeys, num_keys: int) -> Tensor:
    """scan_q [t, h, r + d_rope] times the first keys, [t, h, num_keys] fp32."""
    scan_k = torch.cat([keys.z[:num_keys], keys.rope[:num_keys]], dim=-1)
    return (scan_q.flatten(0, 1) @ scan_k.T).view(*scan_q.shape[:2], num_keys).float()


@torch.no_grad()
def lowrank_topk_ref(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_count: Tensor, *, topk: int,
    sliding_window: int, max_seqlen: int, layout: KVLayout, block_size: int, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.selector.lowrank_topk`."""
    t, h, _ = scan_q.shape
    topk_indices = key_end.new_full((t, topk), -1)
    lse = scan_q.new_full((t, h), float("-inf"), dtype=torch.float32)
    for request, total, chunks in request_rows(cu_seqlens_q, key_end, h):
        slots = request_slots(block_table, request, total, block_size)
        keys = scan_keys(
            slots, index_cache, kv_cache,
            layout=layout, block_size=block_size, dtype=scan_q.dtype,
        )  # fmt: skip
        for rows, num_keys in chunks:
            end, start = key_end[rows], torch.zeros_like(key_end[rows])
            scores = scan_scores(scan_q[rows], keys, num_keys)
            weights, row_max = scan_weights_ref(scores, start, end)
            lse[rows] = row_max + weights.sum(-1).log()
            count = torch.minimum(core_count[rows], end)
            chosen = select_core_ref(
                weights, start, end, count, topk=topk, sliding_window=sliding_window
            )
            topk_indices[rows, : chosen.shape[1]] = chosen.int()
    return topk_indices, lse


@torch.no_grad()
def lightning_topk_ref(
    q: Tensor, weights: Tensor, index_cache: Tensor, index_scale: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, *, topk: int, max_seqlen: int,
    block_size: int,
) -> Tensor:  # fmt: skip
    """See `model1.ops.selector.lightning_topk`."""
    topk_indices = key_end.new_full((len(q), topk), -1)
    for request, total, chunks in request_rows(cu_seqlens_q, key_end, q.shape[1]):
        slots = request_slots(block_table, request, total, block_size)
        keys = index_cache.index_select(0, slots).view(torch.float8_e4m3fn).float()
        scale = index_scale[slots]
        for rows, num_keys in chunks:
            logits = torch.einsum("thd,sd->ths", q[rows].float(), keys[:num_keys]).relu()
            scores = torch.einsum("th,ths->ts", weights[rows], logits) * scale[:num_keys]
            end = key_end[rows]
            is_visible = range_mask(num_keys, torch.zeros_like(end), end)
            scores = scores.masked_fill(~is_visible, float("-inf"))
            values, chosen = scores.topk(min(topk, num_keys), dim=-1)
            chosen = chosen.masked_fill(values == float("-inf"), -1)
            topk_indices[rows, : chosen.shape[1]] = chosen.int()
    return topk_indices

"""Plain PyTorch remainder over paged caches: one request at a time, a few rows of it at once."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.dense_attention.ref import range_mask
from model1.ops.indexer.ref import scan_weights_ref
from model1.ops.kv_cache import KVLayout
from model1.ops.remainder.ref import remainder_ref
from model1.ops.selector.ref import request_rows, request_slots, scan_keys, scan_scores


def outside_core(core_indices: Tensor, key_end: Tensor, num_keys: int) -> Tensor:
    """[t, num_keys] bool: visible and not in the core."""
    visible = range_mask(num_keys, torch.zeros_like(key_end), key_end)
    spare = torch.cat([visible, visible.new_zeros(len(visible), 1)], dim=1)
    is_here = (core_indices >= 0) & (core_indices < num_keys)
    spare.scatter_(1, core_indices.long().masked_fill(~is_here, num_keys), False)
    return spare[:, :-1]


@torch.no_grad()
def lowrank_remainder_ref(
    scan_q: Tensor, index_cache: Tensor, kv_cache: Tensor, block_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor, core_indices: Tensor, *,
    max_seqlen: int, rotary_value: bool, layout: KVLayout, block_size: int, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.lowrank_remainder.lowrank_remainder`."""
    rank = index_cache.shape[1]
    width = scan_q.shape[2] if rotary_value else rank
    out = scan_q.new_zeros(*scan_q.shape[:2], width)
    lse = scan_q.new_full(scan_q.shape[:2], float("-inf"), dtype=torch.float32)
    # in the coordinates of z itself
    basis, mean = torch.eye(rank, device=scan_q.device), scan_q.new_zeros(rank)
    for request, total, chunks in request_rows(cu_seqlens_q, key_end, scan_q.shape[1]):
        slots = request_slots(block_table, request, total, block_size)
        keys = scan_keys(
            slots, index_cache, kv_cache,
            layout=layout, block_size=block_size, dtype=scan_q.dtype,
        )  # fmt: skip
        for rows, num_keys in chunks:
            end = key_end[rows]
            scores = scan_scores(scan_q[rows], keys, num_keys)
            weights, row_max = scan_weights_ref(scores, torch.zeros_like(end), end)
            out[rows], lse[rows] = remainder_ref(
                weights, row_max, keys.z[:num_keys], keys.rope[:num_keys],
                basis.to(scan_q.dtype), mean, rotary_value=rotary_value,
                in_rest=outside_core(core_indices[rows], end, num_keys),
            )  # fmt: skip
    return out, lse

"""Plain PyTorch sparse attention: one scan and one exponential serve the choice and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.indexer.ref import lowrank_scores_ref, scan_weights_ref, select_core_ref
from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.ref import gather_and_dequantize_ref
from model1.ops.lowrank_remainder.ref import outside_core
from model1.ops.remainder.ref import merge_ref, remainder_ref
from model1.ops.selector.ref import request_rows, request_slots, scan_keys
from model1.ops.sparse_attention.ref import sparse_attention_ref


class _Keys(NamedTuple):
    """A request's tokens: low-rank vectors, and what fetches the latents of chosen ones."""

    z: Tensor  # [s, r]
    rope: Tensor  # [s, d_rope]
    fetch: Callable[[Tensor], Tensor]  # positions [t, k], -1 = none, to [t, k, d]


def _attend(
    q: Tensor, keys: _Keys, key_end: Tensor, core_count: Tensor, basis: Tensor, mean: Tensor,
    attn_sink: Tensor | None, *, sliding_window: int, rotary_value: bool, value_dim: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Some rows of one request, of which at least one sees all of `keys`."""
    scores = lowrank_scores_ref(q, keys.z, keys.rope, basis, mean, softmax_scale=softmax_scale)
    start = torch.zeros_like(key_end)
    weights, row_max = scan_weights_ref(scores, start, key_end)
    count = torch.minimum(core_count, key_end)
    chosen = select_core_ref(
        weights, start, key_end, count,
        topk=max(1, int(count.max())), sliding_window=sliding_window,
    )  # fmt: skip
    core_out, core_lse = sparse_attention_ref(
        q, keys.fetch(chosen), valid=chosen >= 0, value_dim=value_dim, softmax_scale=softmax_scale
    )
    rest_out, rest_lse = remainder_ref(
        weights, row_max, keys.z, keys.rope, basis, mean,
        in_rest=outside_core(chosen, key_end, len(keys.z)), rotary_value=rotary_value,
    )  # fmt: skip
    return merge_ref(core_out, core_lse, rest_out, rest_lse, attn_sink)


@torch.no_grad()
def lowrank_attention_ref(
    q: Tensor, kv_cache: Tensor, index_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, key_end: Tensor, core_count: Tensor, basis: Tensor, mean: Tensor, *,
    topk: int, sliding_window: int, max_seqlen: int, rotary_value: bool, layout: KVLayout,
    block_size: int, value_dim: int, softmax_scale: float, attn_sink: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.lowrank_attention.lowrank_attention`."""
    out = q.new_zeros(*q.shape[:2], value_dim)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    cache = {"layout": layout, "block_size": block_size, "dtype": q.dtype}
    for request, total, chunks in request_rows(cu_seqlens_q, key_end, q.shape[1]):
        slots = request_slots(block_table, request, total, block_size)
        z, rope = scan_keys(slots, index_cache, kv_cache, **cache)

        def fetch(chosen: Tensor, slots: Tensor = slots) -> Tensor:
            at = torch.where(chosen >= 0, slots[chosen.clamp(min=0)], -1)
            return gather_and_dequantize_ref(kv_cache, at, **cache)

        for rows, num_keys in chunks:
            out[rows], lse[rows] = _attend(
                q[rows], _Keys(z[:num_keys], rope[:num_keys], fetch), key_end[rows],
                core_count[rows], basis, mean, attn_sink, sliding_window=sliding_window,
                rotary_value=rotary_value, value_dim=value_dim, softmax_scale=softmax_scale,
            )  # fmt: skip
    return out, lse

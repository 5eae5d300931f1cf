"""Plain PyTorch low-rank scan and core selection."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.dense_attention.ref import range_mask


def lowrank_scores_ref(
    q: Tensor, z: Tensor, k_rope: Tensor, basis: Tensor, mean: Tensor, *, softmax_scale: float
) -> Tensor:
    """See `model1.ops.indexer.lowrank_scores`."""
    t, h, _ = q.shape
    d_nope = mean.shape[0]
    q_nope, q_rope = q[..., :d_nope], q[..., d_nope:]
    # One product of width r + d_rope serves both parts.
    scan_q = torch.cat([q_nope @ basis.T.to(q.dtype), q_rope], dim=-1).flatten(0, 1)
    scan_k = torch.cat([z, k_rope], dim=-1).to(q.dtype)
    scores = (scan_q @ scan_k.T).view(t, h, len(z)).float()
    offset = (q_nope @ mean.to(q.dtype)).float()
    return (scores + offset.unsqueeze(-1)) * softmax_scale


def select_core_ref(
    scores: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    core_count: Tensor,
    *,
    topk: int,
    sliding_window: int,
) -> Tensor:
    """See `model1.ops.indexer.select_core`."""
    num_keys = scores.shape[-1]
    visible = range_mask(num_keys, key_start, key_end)
    masked = scores.masked_fill(~visible[:, None, :], float("-inf"))
    pooled = torch.softmax(masked, dim=-1).sum(dim=1)
    pooled = pooled.masked_fill(~visible, -1.0)
    window_start = torch.maximum(key_start, key_end - sliding_window)
    pooled = pooled.masked_fill(range_mask(num_keys, window_start, key_end), float("inf"))
    values, indices = pooled.topk(min(topk, num_keys), dim=-1)
    rank = torch.arange(indices.shape[-1], device=indices.device)
    unused = (rank >= core_count[:, None]) | (values < 0)
    return indices.masked_fill(unused, -1)

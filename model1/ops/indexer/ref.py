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
    q = q * softmax_scale
    q_nope, q_rope = q[..., :d_nope], q[..., d_nope:]
    offset = (q_nope @ mean.to(q.dtype)).unsqueeze(-1)
    # One product for the projected, the rotary and the constant part: this matrix is the widest.
    scan_q = torch.cat([q_nope @ basis.T.to(q.dtype), q_rope, offset], dim=-1).flatten(0, 1)
    scan_k = torch.cat([z, k_rope, torch.ones_like(z[:, :1])], dim=-1).to(q.dtype)
    return (scan_q @ scan_k.T).view(t, h, len(z)).float()


def _hide(scores: Tensor, key_start: Tensor, key_end: Tensor) -> None:
    """-inf in place where a key is not visible; only columns that some row does not see."""
    num_keys = scores.shape[-1]
    first = int(key_end.min()) if len(key_end) else num_keys
    last = int(key_start.max()) if len(key_start) else 0
    for begin, end in ((first, num_keys), (0, last)):
        if begin < end:
            hidden = ~range_mask(num_keys, key_start, key_end)[:, None, begin:end]
            scores[..., begin:end].masked_fill_(hidden, float("-inf"))


def scan_weights_ref(scores: Tensor, key_start: Tensor, key_end: Tensor) -> tuple[Tensor, Tensor]:
    """See `model1.ops.indexer.scan_weights`."""
    if torch.is_grad_enabled():
        hidden = ~range_mask(scores.shape[-1], key_start, key_end)
        scores = scores.masked_fill(hidden[:, None, :], float("-inf"))
    else:
        _hide(scores, key_start, key_end)
    row_max = scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    return torch.exp(scores - row_max), row_max.squeeze(-1)


def select_core_ref(
    weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    core_count: Tensor,
    *,
    topk: int,
    sliding_window: int,
) -> Tensor:
    """See `model1.ops.indexer.select_core`."""
    num_keys = weights.shape[-1]
    # sum over heads of the normalised weights, as one small matrix product per row
    inverse = weights.sum(dim=-1, keepdim=True).clamp(min=1e-30).reciprocal()
    pooled = torch.bmm(inverse.transpose(1, 2), weights)[:, 0]
    pooled = pooled.masked_fill(~range_mask(num_keys, key_start, key_end), -1.0)
    window_start = torch.maximum(key_start, key_end - sliding_window)
    pooled = pooled.masked_fill(range_mask(num_keys, window_start, key_end), float("inf"))
    values, indices = pooled.topk(min(topk, num_keys), dim=-1)
    rank = torch.arange(indices.shape[-1], device=indices.device)
    unused = (rank >= core_count[:, None]) | (values < 0)
    return indices.masked_fill(unused, -1)

"""Plain PyTorch dense attention over one shared latent: oracle, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def range_mask(num_keys: int, key_start: Tensor, key_end: Tensor) -> Tensor:
    """[t, num_keys] bool, true where key_start <= j < key_end."""
    j = torch.arange(num_keys, device=key_start.device)
    return (j >= key_start[:, None]) & (j < key_end[:, None])


def _softmax_with_sink(scores: Tensor, attn_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and natural log-sum-exp (sink left out) of scores [..., h, s]."""
    lse = torch.logsumexp(scores, dim=-1)
    total = lse if attn_sink is None else torch.logaddexp(lse, attn_sink.to(lse.dtype))
    # A row without keys has lse -inf: its scores are all -inf and must give 0, not NaN.
    total = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
    return torch.exp(scores - total.unsqueeze(-1)), lse


def dense_attention_ref(
    q: Tensor,
    kv: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.dense_attention.dense_attention`."""
    t, h, d = q.shape
    scores = (q.reshape(t * h, d) @ kv.T).view(t, h, len(kv)).float() * softmax_scale
    mask = range_mask(kv.shape[0], key_start, key_end)
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    probabilities, lse = _softmax_with_sink(scores, attn_sink)
    out = probabilities.to(kv.dtype).flatten(0, 1) @ kv[:, :value_dim]
    return out.view(t, h, value_dim), lse


def dense_decode_ref(
    q: Tensor,
    kv: Tensor,
    cache_seqlens: Tensor,
    *,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.dense_attention.dense_decode`."""
    scores = torch.bmm(q, kv.transpose(1, 2)).float() * softmax_scale
    j = torch.arange(kv.shape[1], device=kv.device)
    unused = (j >= cache_seqlens[:, None])[:, None, :]
    probabilities, lse = _softmax_with_sink(scores.masked_fill(unused, float("-inf")), attn_sink)
    return torch.bmm(probabilities.to(kv.dtype), kv[:, :, :value_dim]), lse

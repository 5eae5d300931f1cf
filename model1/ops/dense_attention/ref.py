"""Plain PyTorch dense attention over one shared latent: oracle, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def range_mask(num_keys: int, key_start: Tensor, key_end: Tensor) -> Tensor:
    """[t, num_keys] bool, true where key_start <= j < key_end."""
    j = torch.arange(num_keys, device=key_start.device)
    return (j >= key_start[:, None]) & (j < key_end[:, None])


# Stands for an infinite sink: far beyond any logit, yet finite, so that no row becomes NaN.
_HUGE = 1e30


def _softmax_with_sink(scores: Tensor, attn_sink: Tensor | None) -> Tensor:
    """Probabilities of scores [t, h, s] with one more logit per head in the denominator."""
    if attn_sink is None:
        # A sink without weight: it only keeps rows without keys from 0 / 0.
        sink = scores.new_full((1,), -_HUGE)
    else:
        sink = attn_sink.to(scores.dtype).clamp(-_HUGE, _HUGE)
    column = sink.expand(scores.shape[:-1]).unsqueeze(-1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def dense_attention_ref(
    q: Tensor,
    kv: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `model1.ops.dense_attention.dense_attention`."""
    t, h, d = q.shape
    scores = (q.reshape(t * h, d) @ kv.T).view(t, h, len(kv)).float() * softmax_scale
    mask = range_mask(kv.shape[0], key_start, key_end)
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    probabilities = _softmax_with_sink(scores, attn_sink)
    lse = torch.logsumexp(scores, dim=-1) if return_lse else None
    out = probabilities.to(kv.dtype).flatten(0, 1) @ kv[:, :value_dim]
    return out.view(t, h, value_dim), lse

"""Plain PyTorch attention over gathered rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention_ref(
    q: Tensor,
    kv: Tensor,
    *,
    valid: Tensor,
    value_dim: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.sparse_attention.sparse_attention`."""
    scores = torch.bmm(q, kv.transpose(1, 2)).float() * softmax_scale
    scores = scores.masked_fill(~valid[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    total = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    probabilities = torch.exp(scores - total.unsqueeze(-1)).to(kv.dtype)
    return torch.bmm(probabilities, kv[:, :, :value_dim]), lse

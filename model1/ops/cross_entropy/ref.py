"""Plain PyTorch for the cross-entropy of a linear map and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_IGNORE = -100


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    chunk_tokens: int, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, d hidden in its dtype and d weight in fp32 (fp64 with fp64 states).

    See `model1.ops.cross_entropy`; a gradient that is not needed is an empty tensor.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    matrix, d_hidden = weight.to(hidden.dtype), []
    d_weight = torch.zeros(weight.shape if needs_weight else (0,), dtype=wide, device=hidden.device)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    for part, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        losses, d_logits = _rows((part @ matrix.T).to(wide), wanted)
        loss = loss + losses.sum()
        d_logits = d_logits.to(hidden.dtype)
        if needs_hidden:
            d_hidden.append(d_logits @ matrix)
        if needs_weight:
            d_weight += d_logits.T.to(wide) @ part.to(wide)
    return loss, torch.cat(d_hidden) if needs_hidden else hidden.new_empty(0), d_weight


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n] and their gradients [n, vocab] of logits [n, vocab]."""
    vocab = logits.shape[1]
    is_known, is_ignored = (targets >= 0) & (targets < vocab), targets == _IGNORE
    index = targets.clamp(0, vocab - 1)[:, None]
    log_p = logits.log_softmax(dim=1)
    otherwise = torch.where(is_ignored, 0.0, math.nan).to(logits)
    losses = torch.where(is_known, -log_p.gather(1, index)[:, 0], otherwise)
    one_hot = torch.zeros_like(logits).scatter_(1, index, 1.0)
    d_logits = torch.where(is_known[:, None], log_p.exp() - one_hot, otherwise[:, None])
    return losses, d_logits

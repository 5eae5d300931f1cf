"""Plain PyTorch low-rank remainder of the softmax and the merge of two passes."""

from __future__ import annotations

import torch
from torch import Tensor


def remainder_ref(
    weights: Tensor,
    row_max: Tensor,
    z: Tensor,
    k_rope: Tensor,
    basis: Tensor,
    mean: Tensor,
    *,
    in_rest: Tensor,
    rotary_value: bool,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.remainder.remainder`."""
    t, h, s = weights.shape
    weights = weights * in_rest[:, None, :].to(weights.dtype)
    mass = weights.sum(dim=-1)
    rest = torch.cat([z, k_rope], dim=-1) if rotary_value else z
    summed = (weights.view(t * h, s).to(rest.dtype) @ rest).view(t, h, rest.shape[-1])
    # An empty rest has mass 0: out 0, lse -inf, and no gradient.
    is_empty = mass == 0
    mass = mass.masked_fill(is_empty, 1.0)
    summed = summed / mass.unsqueeze(-1).to(rest.dtype)
    rank = z.shape[-1]
    offset = (~is_empty).unsqueeze(-1).to(z.dtype) * mean.to(z.dtype)
    nope = summed[..., :rank] @ basis.to(z.dtype) + offset
    lse = (row_max + torch.log(mass)).masked_fill(is_empty, float("-inf"))
    return torch.cat([nope, summed[..., rank:]], dim=-1), lse


def merge_ref(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, attn_sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.remainder.merge`."""
    lse = torch.logaddexp(lse_a, lse_b)
    total = lse if attn_sink is None else torch.logaddexp(lse, attn_sink.to(lse.dtype))
    total = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
    weight_a = torch.exp(lse_a - total).unsqueeze(-1).to(out_a.dtype)
    weight_b = torch.exp(lse_b - total).unsqueeze(-1).to(out_b.dtype)
    return out_a * weight_a + out_b * weight_b, lse

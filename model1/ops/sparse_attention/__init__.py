"""Attention of each query over its own list of tokens."""

from __future__ import annotations

from torch import Tensor

from model1.ops.sparse_attention.ref import sparse_attention_ref


def sparse_attention(
    q: Tensor, kv: Tensor, *, valid: Tensor, value_dim: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [t, h, d] over the rows kv [t, k, d] gathered for each query.

    out[i] = sum_j softmax_j(softmax_scale * q[i] . kv[i, j]) kv[i, j, :value_dim], valid j only

    valid: [t, k] bool; rows that are not valid must be finite (the gather fills them with zeros).
    Returns out [t, h, value_dim] in the dtype of kv and lse [t, h] fp32, natural log. A row with
    no valid key gives out = 0, lse = -inf. Differentiable. Source: DeepSeek-V3.2, section 2.
    """
    if q.dim() != 3 or kv.dim() != 3 or q.shape[0] != kv.shape[0] or q.shape[-1] != kv.shape[-1]:
        raise ValueError(
            f"q must be [t, h, d] and kv [t, k, d], got {list(q.shape)}, {list(kv.shape)}"
        )
    if valid.shape != kv.shape[:2]:
        raise ValueError(f"valid must be {list(kv.shape[:2])}, got {list(valid.shape)}")
    if not 0 < value_dim <= kv.shape[-1]:
        raise ValueError(f"value_dim must be in 1..{kv.shape[-1]}, got {value_dim}")
    return sparse_attention_ref(
        q, kv, valid=valid, value_dim=value_dim, softmax_scale=softmax_scale
    )

"""Dense attention of many query heads over one shared key/value latent."""

from __future__ import annotations

from torch import Tensor

from model1.ops.dense_attention.ref import dense_attention_ref, range_mask

__all__ = ["dense_attention", "range_mask"]


def _check(q: Tensor, kv: Tensor, value_dim: int, attn_sink: Tensor | None) -> None:
    if q.shape[-1] != kv.shape[-1]:
        raise ValueError(f"q and kv must share their last axis, got {q.shape[-1]}, {kv.shape[-1]}")
    if not 0 < value_dim <= kv.shape[-1]:
        raise ValueError(f"value_dim must be in 1..{kv.shape[-1]}, got {value_dim}")
    if attn_sink is not None and attn_sink.shape != (q.shape[1],):
        raise ValueError(f"attn_sink must be [{q.shape[1]}], got {list(attn_sink.shape)}")


def dense_attention(
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
    """Attention of q [t, h, d] over the keys key_start[i] <= j < key_end[i] of kv [s, d].

    out[i] = sum_j e^(scale q[i].kv[j]) kv[j, :value_dim] / (sum_j e^(scale q[i].kv[j]) + e^sink)

    key_start, key_end: [t] int64. attn_sink: [h] fp32 or None. Returns out [t, h, value_dim] in
    the dtype of kv and lse [t, h] fp32, the natural-log denominator without the sink (None unless
    return_lse). A row without keys gives out = 0, lse = -inf. Unseen rows of kv must be finite.
    Differentiable.
    Source: DeepSeek-V4 attention, arXiv 2606.19348.
    """
    if q.dim() != 3 or kv.dim() != 2:
        raise ValueError(f"q must be [t, h, d] and kv [s, d], got {q.dim()} and {kv.dim()} axes")
    if key_start.shape != (q.shape[0],) or key_end.shape != (q.shape[0],):
        raise ValueError(f"key_start and key_end must be [{q.shape[0]}]")
    _check(q, kv, value_dim, attn_sink)
    return dense_attention_ref(
        q, kv, key_start, key_end,
        value_dim=value_dim, softmax_scale=softmax_scale, attn_sink=attn_sink,
        return_lse=return_lse,
    )  # fmt: skip

"""Attention over ragged batches, `flash_attn_varlen_*`: separate heads, forward and backward."""

from __future__ import annotations

from torch import Tensor

from model1.flash_mla.metadata import refusals_as_runtime_errors, require
from model1.ops.mha_prefill import mha_prefill


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention within each sequence of a ragged batch.

    out = softmax(softmax_scale q k^T) v

    q: [total_q, h, d], k: [total_k, h_k, d], v: [total_k, h_k, dv], h a multiple of h_k.
    cu_seqlens_*: [b + 1] int32 prefix sums of the lengths, at most max_seqlen_*. softmax_scale:
    None means d ** -0.5. causal aligns the last query with the last key. is_varlen = False
    promises equal lengths, which are not needed here.
    Returns out [total_q, h, dv] and the natural-log lse [total_q, h] fp32; a query without keys
    has out = 0 and lse = -inf. Differentiable in q, k and v; lse carries no gradient. Raises
    AssertionError for dropout and deterministic = True, which FlashMLA does not have,
    RuntimeError for tensors that cannot be used. Source: the public FlashMLA interface.
    """
    require(dropout_p == 0.0, "dropout_p must be 0")
    require(not deterministic, "deterministic must be False")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with refusals_as_runtime_errors():
        return mha_prefill(
            q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv,
            softmax_scale=scale, causal=causal,
        )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` of qkv [total, h, 2 head_dim_qk + dv]: q, k, v side by side."""
    d = head_dim_qk
    return flash_attn_varlen_func(
        *(qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]),
        *(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` of kv [total_k, h_k, head_dim_qk + dv]: k and v side by side."""
    return flash_attn_varlen_func(
        *(q, kv[..., :head_dim_qk], kv[..., head_dim_qk:]),
        *(cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )

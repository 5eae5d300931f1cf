"""Multi-head attention of ragged prefill and training batches, forward and backward.

Nothing is paged here: keys and values of all requests lie back to back, as the queries do. The
operator of the public `flash_attn_varlen_func` for any head dims and any number of key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.mha_prefill.checks import check_lengths, check_tensors


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.mha_prefill.ref:{name}_ref",
            "triton": f"model1.ops.mha_prefill.portable:{name}_triton",
        },
    )


MHA_PREFILL = _operator("mha_prefill")
MHA_PREFILL_BACKWARD = _operator("mha_prefill_backward")


def mha_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the keys of its own request.

    out[i, h] = sum_s e^(p_s - lse[i, h]) v_s,  lse[i, h] = ln sum_s e^p_s,
    p_s = softmax_scale q[i, h] . k_s

    With causal, query j of a request's n sees its first s_k - (n - 1 - j) keys: the last query
    sees all s_k. q: [t, h, d], k: [s, hkv, d], v: [s, hkv, dv], one dtype of bf16, fp16 and fp32,
    any strides but for a contiguous last axis; head j of q reads head j // (h / hkv).
    cu_seqlens_q and cu_seqlens_k: [b + 1] int32 prefix sums, 0 to t and 0 to s; requests may be
    empty. max_seqlen_q and max_seqlen_k: tokens of the longest request or more (host ints).

    Returns out [t, h, dv] in q's dtype and lse [t, h] fp32, a transposed view. A query without
    keys gives out = 0, lse = -inf. A NaN in a key reaches the queries that see it, and may reach
    others of its request. Differentiable in q, k and v, once; no gradient flows through lse.
    Results and gradients of a request are the same bits every time, whatever the other requests,
    their order and max_seqlen_*: `deterministic`, which other operators of attention take, changes
    nothing here.
    Raises ValueError for shapes, dtypes, strides and devices, and on the CPU for prefix sums that
    do not fit; BackendUnavailable for a backend that cannot run here. triton takes heads of at most
    576 channels, in fp32 256.
    Source: the public FlashMLA interface.
    """
    check_tensors(q, k, v)
    check_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    return torch.ops.model1.mha_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, MHA_PREFILL.resolve(backend, q.device),
    )  # fmt: skip


@torch.library.custom_op("model1::mha_prefill", mutates_args=())
def _mha_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return MHA_PREFILL.load(backend)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip


@torch.library.custom_op("model1::mha_prefill_backward", mutates_args=())
def _mha_prefill_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return MHA_PREFILL_BACKWARD.load(backend)(
        d_out.contiguous(), q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q,
        max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip


@_mha_prefill.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    t, h, _ = q.shape
    return q.new_empty(t, h, v.shape[2]), q.new_empty(h, t, dtype=torch.float32).T


@_mha_prefill_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, max_q, max_k, scale, causal, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.fields = (max_q, max_k, scale, causal, backend)


def _backward(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.model1.mha_prefill_backward(d_out, *ctx.saved_tensors, *ctx.fields)
    return *gradients, None, None, None, None, None, None, None


_mha_prefill.register_autograd(_backward, setup_context=_setup_context)

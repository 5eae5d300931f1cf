"""Plain PyTorch attention of ragged batches and its gradients: the oracle, and the CPU path.

One request at a time, sums in fp32. The lengths are read on the host, which waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def mha_prefill_ref(
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
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.mha_prefill.mha_prefill`."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], len(q)), float("-inf"), dtype=torch.float32).T
    group = q.shape[1] // k.shape[1]
    for rows, keys in _requests(cu_seqlens_q, cu_seqlens_k):
        k_i, v_i = (_per_head(x[keys], group) for x in (k, v))
        scores = _scores(q[rows].float(), k_i, softmax_scale, causal)
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - _finite(total)[..., None])
        out[rows] = torch.einsum("nhs,shd->nhd", weights, v_i).to(q.dtype)
        lse[rows] = total.to(lse.dtype)
    return out, lse


def mha_prefill_backward_ref(
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
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; out and lse are the forward's results.

    P = e^(scores - lse), dS = P (d_out V^T - sum(out d_out)), dq = scale dS K, dk = scale dS^T Q,
    dv = P^T d_out; keys and values sum over the query heads that read them.
    """
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for rows, keys in _requests(cu_seqlens_q, cu_seqlens_k):
        q_i, d_out_i = q[rows].float(), d_out[rows].float()
        k_i, v_i = (_per_head(x[keys], group) for x in (k, v))
        scores = _scores(q_i, k_i, softmax_scale, causal)
        weights = torch.exp(scores - _finite(lse[rows])[..., None])
        delta = (out[rows].float() * d_out_i).sum(-1, keepdim=True)
        slope = weights * (torch.einsum("nhd,shd->nhs", d_out_i, v_i) - delta) * softmax_scale
        dq[rows] = torch.einsum("nhs,shd->nhd", slope, k_i).to(q.dtype)
        dk_i = torch.einsum("nhs,nhd->shd", slope, q_i)
        dv_i = torch.einsum("nhs,nhd->shd", weights, d_out_i)
        dk[keys] = dk_i.unflatten(1, (-1, group)).sum(2).to(k.dtype)
        dv[keys] = dv_i.unflatten(1, (-1, group)).sum(2).to(v.dtype)
    return dq, dk, dv


def _requests(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of the queries and of the keys of each request that has both."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        if rows.start < rows.stop and keys.start < keys.stop:
            yield rows, keys


def _per_head(x: Tensor, group: int) -> Tensor:
    """[s, hkv, d] as fp32 [s, h, d]."""
    return x.float().repeat_interleave(group, dim=1)


def _scores(q: Tensor, k: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """[n, h, s] logits of one request, -inf where the query does not see the key."""
    scores = torch.einsum("nhd,shd->nhs", q, k) * softmax_scale
    if causal:
        n, _, s = scores.shape
        num_keys = s - torch.arange(n - 1, -1, -1, device=q.device)
        hidden = torch.arange(s, device=q.device) >= num_keys[:, None]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
    return scores


def _finite(lse: Tensor) -> Tensor:
    """A row without keys has only -inf scores: any finite denominator gives weights of 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)

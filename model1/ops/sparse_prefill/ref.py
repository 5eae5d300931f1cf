"""Plain PyTorch sparse prefill, forward and backward: gather, one softmax, a few rows at a time.

Computes in fp32, and in fp64 where the inputs are fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GATHERED_BYTES = 1 << 26  # size of the keys gathered at a time, unless one query needs more


def _chunks(
    topk_indices: Tensor, is_valid: Tensor, d: int, dtype: torch.dtype, deterministic: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows to compute together, their lists, and which entries count.

    A padded sum may round otherwise: a deterministic row is alone with the entries that count.
    """
    t, topk = topk_indices.shape
    step = 1 if deterministic else max(1, GATHERED_BYTES // max(1, topk * d * dtype.itemsize))
    for first in range(0, t, step):
        rows = slice(first, min(first + step, t))
        index, counts = topk_indices[rows], is_valid[rows]
        if deterministic:
            index, counts = index[counts][None], counts[counts][None]
        yield rows, index, counts


def _valid_entries(topk_indices: Tensor, topk_length: Tensor | None, num_keys: int) -> Tensor:
    """[t, topk] bool: the entries that count."""
    is_valid = (topk_indices >= 0) & (topk_indices < num_keys)
    if topk_length is not None:
        position = torch.arange(topk_indices.shape[1], device=topk_indices.device)
        is_valid &= position < topk_length[:, None]
    return is_valid


def _gather(kv: Tensor, topk_indices: Tensor, is_valid: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, topk, d] rows of kv, 0 for entries that do not count."""
    keys = torch.zeros(*topk_indices.shape, kv.shape[1], dtype=dtype, device=kv.device)
    keys[is_valid] = kv[topk_indices[is_valid].long()].to(dtype)
    return keys


def _logits(q: Tensor, keys: Tensor, is_valid: Tensor, softmax_scale: float) -> Tensor:
    """[rows, h, topk], -inf for entries that do not count."""
    logits = torch.bmm(q, keys.transpose(1, 2)) * softmax_scale
    return logits.masked_fill(~is_valid[:, None, :], float("-inf"))


def _probabilities(logits: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    total = lse if attn_sink is None else torch.logaddexp(lse, attn_sink.to(lse.dtype))
    # a row without keys has only -inf logits: any finite denominator gives zeros
    return torch.exp(logits - total.masked_fill(total == float("-inf"), 0.0)[..., None])


def sparse_prefill_ref(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.sparse_prefill.sparse_prefill`."""
    t, h, d = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(t, h, value_dim, dtype=q.dtype, device=q.device)
    max_logits = torch.empty(t, h, dtype=dtype, device=q.device)
    lse = torch.empty(t, h, dtype=dtype, device=q.device)
    is_valid = _valid_entries(topk_indices, topk_length, kv.shape[0])
    for rows, index, counts in _chunks(topk_indices, is_valid, d, dtype, deterministic):
        keys = _gather(kv, index, counts, dtype)
        # a copy lies where any allocation does, whatever the row's place in the batch
        logits = _logits(q[rows].to(dtype).clone(), keys, counts, softmax_scale)
        max_logits[rows] = logits.amax(-1) if index.shape[1] else float("-inf")
        lse[rows] = torch.logsumexp(logits, -1)
        p = _probabilities(logits, lse[rows], attn_sink)
        out[rows] = torch.bmm(p, keys[..., :value_dim]).to(q.dtype)
    return out, max_logits, lse.masked_fill(lse == float("-inf"), empty_lse)


def sparse_prefill_backward_ref(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dkv and dsink ([0] without a sink) of `sparse_prefill`, from its out and lse.

    p = e^(logit - ln(e^lse + e^sink)),  dp = dout v^T,  ds = p (dp - sum(p dp)) softmax_scale
    dq = ds k,  dkv = ds^T q + p^T dout,  dsink = -sum_rows p_sink sum(p dp)
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv = torch.zeros(kv.shape, dtype=dtype, device=q.device)
    dsink = torch.zeros(0 if attn_sink is None else q.shape[1], dtype=dtype, device=q.device)
    is_valid = _valid_entries(topk_indices, topk_length, kv.shape[0])
    value_dim = out.shape[-1]
    chunks = _chunks(topk_indices, is_valid, q.shape[-1], dtype, deterministic)
    for rows, index, counts in chunks:
        queries, grads = q[rows].to(dtype).clone(), dout[rows].to(dtype).clone()
        keys = _gather(kv, index, counts, dtype)
        logits = _logits(queries, keys, counts, softmax_scale)
        row_lse = torch.logsumexp(logits, -1)
        p = _probabilities(logits, row_lse, attn_sink)
        dp = torch.bmm(grads, keys[..., :value_dim].transpose(1, 2))
        delta = (p * dp).sum(-1)
        ds = p * (dp - delta[..., None]) * softmax_scale
        dq[rows] = torch.bmm(ds, keys).to(q.dtype)
        dkeys = torch.bmm(ds.transpose(1, 2), queries)
        dkeys[..., :value_dim] += torch.bmm(p.transpose(1, 2), grads)
        with _deterministic(deterministic):
            dkv.index_add_(0, index[counts].long(), dkeys[counts])
        if attn_sink is not None:
            dsink -= (_sink_weight(row_lse, attn_sink.to(dtype)) * delta).sum(0)
    return dq, dkv.to(kv.dtype), dsink if attn_sink is None else dsink.to(attn_sink.dtype)


def _sink_weight(lse: Tensor, attn_sink: Tensor) -> Tensor:
    """The sink's share of each row; any number for a row without keys, whose out is 0."""
    return torch.sigmoid(attn_sink - lse.masked_fill(lse == float("-inf"), 0.0))


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """`index_add_` on a GPU adds in no fixed order unless PyTorch is told to."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

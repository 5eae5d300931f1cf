"""Plain PyTorch paged decode: gather a request's blocks, one softmax over its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.kv_cache.layout import KVLayout
from model1.ops.kv_cache.ref import gather_and_dequantize_ref


def _keys(
    kv_cache: Tensor, blocks: Tensor, layout: KVLayout | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The tokens of the given blocks, [blocks * block_size, hkv, d]."""
    if layout is None:
        return kv_cache.index_select(0, blocks).flatten(0, 1)
    offsets = torch.arange(block_size, device=blocks.device)
    slots = (blocks[:, None] * block_size + offsets).flatten()
    keys = gather_and_dequantize_ref(
        kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype
    )
    return keys[:, None]


def _attend(
    q: Tensor, kv: Tensor, num_keys: Tensor, attn_sink: Tensor | None, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q [s_q, h, d] over the first num_keys[j] rows of kv [s, hkv, d]: out and lse, widened."""
    kv = kv.float().repeat_interleave(q.shape[1] // kv.shape[1], dim=1)
    scores = torch.einsum("jhd,shd->jhs", q.float(), kv) * scale
    position = torch.arange(kv.shape[0], device=q.device)
    scores = scores.masked_fill((position >= num_keys[:, None])[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    total = lse if attn_sink is None else torch.logaddexp(lse, attn_sink)
    # a row without keys has only -inf scores: any finite denominator gives out = 0
    weights = torch.exp(scores - total.masked_fill(total == float("-inf"), 0.0)[..., None])
    return torch.einsum("jhs,shd->jhd", weights, kv[..., :value_dim]), lse


def paged_decode_ref(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    attn_sink: Tensor | None,
    layout: KVLayout | None,
    block_size: int,
    value_dim: int,
    softmax_scale: float,
    causal: bool,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.paged_decode.paged_decode`; one request at a time, sums in fp32."""
    b, max_blocks = block_table.shape
    rows = q.flatten(0, -3)  # [t, h, d]
    s_q = max_seqlen_q if cu_seqlens_q is not None else q.shape[1]
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(b + 1, device=q.device) * s_q
    # one row more than there are queries takes the results of the queries that do not exist
    out = q.new_zeros(len(rows) + 1, q.shape[-2], value_dim)
    lse = q.new_zeros(len(rows) + 1, q.shape[-2], dtype=torch.float32)
    j = torch.arange(s_q, device=q.device)
    position = torch.arange(max_blocks * block_size, device=q.device)
    for i in range(b if len(rows) else 0):
        length, q_len = cache_seqlens[i], cu_seqlens_q[i + 1] - cu_seqlens_q[i]
        index = torch.where(j < q_len, cu_seqlens_q[i] + j, len(rows))
        used = position[::block_size] < length
        blocks = block_table[i].masked_fill(~used, 0).long()
        keys = _keys(kv_cache, blocks, layout, block_size, q.dtype)
        keys = keys.masked_fill((position >= length)[:, None, None], 0.0)
        num_keys = length - (q_len - 1 - j) if causal else length.expand(s_q)
        q_i = rows[index.clamp_max(len(rows) - 1)]
        out_i, lse_i = _attend(q_i, keys, num_keys, attn_sink, value_dim, softmax_scale)
        out[index] = out_i.to(q.dtype)
        lse[index] = lse_i.masked_fill(lse_i == float("-inf"), empty_lse).to(lse.dtype)
    return out[:-1].view(*q.shape[:-1], value_dim), lse[:-1].view(q.shape[:-1])

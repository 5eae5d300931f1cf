"""Plain PyTorch paged decode: gather the requests' blocks, one softmax over their keys.

The keys of a request are read once for all query heads of a key head. Requests with one query run
as one padded batch, the others one at a time. The host reads the lengths, and so waits for a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.ops.kv_cache.layout import KVLayout
from model1.ops.kv_cache.ref import gather_and_dequantize_ref

# Bounds the scores in memory, and under causality the keys that are multiplied in vain.
QUERY_CHUNK = 256


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
    """See `model1.ops.paged_decode.paged_decode`; sums in fp32."""
    b, max_blocks = block_table.shape
    rows = q.flatten(0, -3)  # [t, h, d]
    if cu_seqlens_q is None:
        first = [i * q.shape[1] for i in range(b + 1)]
    else:
        first = cu_seqlens_q.tolist()
    capacity = max_blocks * block_size
    lengths = [min(max(n, 0), capacity) for n in cache_seqlens.tolist()]
    parts = []
    for requests, index, num_later in _passes(first, deterministic):
        ends = [max(0, lengths[i] - (num_later if causal else 0)) for i in requests]
        if max(ends) == 0:
            continue
        table = block_table if len(requests) == b else block_table[requests]
        keys = _keys(kv_cache, table, ends, layout, block_size, q.dtype)
        q_i = rows[index].float() * softmax_scale
        key_end = _KeyEnd(ends, len(q_i) // len(requests) if causal else 1)
        out_i, lse_i = _attend_heads(q_i, keys, key_end, attn_sink, value_dim)
        if key_end.smallest <= 0:
            lse_i = lse_i.masked_fill(lse_i == float("-inf"), empty_lse)
        parts.append((index, out_i.to(q.dtype), lse_i))
    out, lse = _join(parts, rows, value_dim, empty_lse)
    return out.view(*q.shape[:-1], value_dim), lse.view(q.shape[:-1])


class _KeyEnd(NamedTuple):
    """How many keys each query sees: queries j of request i, ends[i] less one for each after j."""

    ends: list[int]
    num_steps: int  # queries; 1 where all of a request see the same keys

    @property
    def smallest(self) -> int:
        return min(self.ends) - (self.num_steps - 1)

    def hidden(self, position: Tensor) -> Tensor:
        """Of these positions [s], [g, n or 1, s]."""
        ends = torch.tensor(self.ends, device=position.device)[:, None, None]
        if self.num_steps > 1:
            steps = torch.arange(self.num_steps - 1, -1, -1, device=position.device)
            ends = ends - steps[:, None]
        return position >= ends


def _passes(
    first: list[int], deterministic: bool
) -> Iterator[tuple[list[int], slice | list[int], int]]:
    """Requests to run together, their rows, and how many queries of them come after those rows.

    A padded sum may depend on the longest request: deterministic ones are alone.
    """
    counts = [end - start for start, end in pairwise(first)]
    single = [] if deterministic else [i for i, n in enumerate(counts) if n == 1]
    if single:
        index = [first[i] for i in single]
        is_range = index[-1] - index[0] == len(index) - 1
        yield single, slice(index[0], index[-1] + 1) if is_range else index, 0
    for i, (start, end) in enumerate(pairwise(first)):
        if end - start > 1 or deterministic:
            for row in range(start, end, QUERY_CHUNK):
                stop = min(row + QUERY_CHUNK, end)
                yield [i], slice(row, stop), end - stop


def _keys(
    kv_cache: Tensor, block_table: Tensor, lengths: list[int], layout: KVLayout | None,
    block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The first lengths[i] tokens of each request, zeros after them: dtype [g, s, hkv, d]."""
    table = block_table[:, : -(-max(lengths) // block_size)].cpu().numpy().tobytes()
    slots = _slots(table, tuple(lengths), block_size, len(kv_cache)).to(kv_cache.device)
    if layout is not None:
        return gather_and_dequantize_ref(
            kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype
        )[:, :, None]
    found = slots.clamp_min(0)  # zeros replace what is read past a request's end
    keys = kv_cache[found // block_size, found % block_size]
    return keys.masked_fill_((slots < 0)[..., None, None], 0.0)


@functools.lru_cache(maxsize=1)  # every layer of a model asks for the same
def _slots(table: bytes, lengths: tuple[int, ...], block_size: int, num_blocks: int) -> Tensor:
    """Slots of the first tokens of each request, -1 after them: int64 [g, s]; table: int32."""
    # On the host, where NumPy takes a microsecond for what PyTorch takes five.
    blocks = np.frombuffer(table, np.int32).reshape(len(lengths), -1, 1).astype(np.int64)
    longest = max(lengths)
    slots = blocks * block_size + np.arange(block_size)
    slots = slots.reshape(len(lengths), -1)[:, :longest]
    is_past = np.arange(longest) >= np.array(lengths)[:, None]
    is_wrong = ~is_past & ((slots < 0) | (slots >= num_blocks * block_size))
    if is_wrong.any():
        rule = f"block_table must hold ids in 0..{num_blocks - 1} where a request has tokens"
        raise ValueError(f"{rule}, got {slots[is_wrong][0] // block_size}")
    return torch.from_numpy(np.where(is_past, -1, slots))


def _join(
    parts: list[tuple[slice | list[int], Tensor, Tensor]], rows: Tensor, value_dim: int,
    empty_lse: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of all rows; those in no part see no key."""
    if len(parts) == 1 and len(parts[0][1]) == len(rows):
        return parts[0][1:]
    out = rows.new_zeros(*rows.shape[:2], value_dim)
    lse = torch.full(rows.shape[:2], empty_lse, dtype=torch.float32, device=rows.device)
    for index, out_i, lse_i in parts:
        out[index], lse[index] = out_i, lse_i
    return out, lse


def _attend_heads(
    q: Tensor, keys: Tensor, key_end: _KeyEnd, attn_sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """`_attend` of keys [g, s, hkv, d]: each key head serves its group of query heads."""
    hkv = keys.shape[2]
    if hkv == 1:
        return _attend(q, keys[:, :, 0].float(), key_end, attn_sink, value_dim)
    q_heads = q.chunk(hkv, dim=1)
    sinks = [None] * hkv if attn_sink is None else attn_sink.chunk(hkv)
    pairs = [
        _attend(q_heads[i], keys[:, :, i].float(), key_end, sinks[i], value_dim) for i in range(hkv)
    ]
    return torch.cat([out for out, _ in pairs], 1), torch.cat([lse for _, lse in pairs], 1)


def _attend(
    q: Tensor, kv: Tensor, key_end: _KeyEnd, attn_sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """q [g n, h, d], scaled, n rows for each of kv [g, s, d]: out [g n, h, value_dim] and lse."""
    (t, h, d), (g, s, _) = q.shape, kv.shape
    scores = torch.bmm(q.reshape(g, -1, d), kv.mT).view(t, h, s)
    first_hidden = max(key_end.smallest, 0)
    if first_hidden < s:
        position = torch.arange(first_hidden, s, device=q.device)
        tail = scores.view(g, -1, h, s)[..., first_hidden:]
        tail.masked_fill_(key_end.hidden(position)[:, :, None], float("-inf"))
    # without keys the maximum would be -inf, and -inf less -inf NaN
    largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log().add_(largest).squeeze(-1)
    if attn_sink is not None:
        total.add_((attn_sink[:, None] - largest).exp_())
    out = torch.bmm(weights.view(g, -1, s), kv[..., :value_dim]).view(t, h, value_dim)
    return out.div_(total.clamp_min_(1.0)), lse  # a row with keys has a sum of at least 1

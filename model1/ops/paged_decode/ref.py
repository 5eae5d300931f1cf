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
from model1.ops.kv_cache.ref import gather_and_dequantize_ref, plain_run_ref

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
    rows = q.flatten(0, -3)  # [t, h, d]
    tables = [None if x is None else x.cpu().numpy().tobytes() for x in (block_table, cu_seqlens_q)]
    groups = _plan(
        *tables, tuple(cache_seqlens.tolist()), q.shape[1], block_table.shape[1], block_size,
        len(kv_cache), causal, deterministic, kv_cache.device,
    )  # fmt: skip
    parts = []
    for group in groups:
        keys = _keys(kv_cache, group, layout, block_size, q)
        for part in group.passes:
            q_i = _take(rows, part.rows).float() * softmax_scale
            out_i, lse_i = _attend_heads(q_i, keys, part, attn_sink, value_dim)
            if part.has_empty:
                lse_i = lse_i.masked_fill(lse_i == float("-inf"), empty_lse)
            parts.append((part.rows, out_i.type_as(q), lse_i))
    out, lse = _join(parts, rows, value_dim, empty_lse)
    return out.view(*q.shape[:-1], value_dim), lse.view(q.shape[:-1])


class _Pass(NamedTuple):
    """Rows that run together, equally many of each request."""

    rows: slice | list[int]
    num_keys: int  # what the row that sees most sees
    first_hidden: int  # all rows see the keys before it
    hidden: Tensor | None  # [g, n or 1, num_keys - first_hidden] bool, of the others; None if none
    has_empty: bool  # a row sees no key


class _Group(NamedTuple):
    """g requests that run together."""

    slots: Tensor  # [g, s] int64, -1 past the end of one
    first_slot: int | None  # where the tokens of a single request follow each other from
    passes: list[_Pass]


@functools.lru_cache(maxsize=1)  # every layer of a model asks for the same
@torch.inference_mode(False)  # a later call may record a gradient
def _plan(
    block_table: bytes, cu_seqlens_q: bytes | None, cache_seqlens: tuple[int, ...], s_q: int,
    max_blocks: int, block_size: int, num_blocks: int, causal: bool, deterministic: bool,
    device: torch.device,
) -> list[_Group]:  # fmt: skip
    """What runs, from the bytes of the int32 tensors."""
    b = len(cache_seqlens)
    table = np.frombuffer(block_table, np.int32).reshape(b, max_blocks).astype(np.int64)
    capacity = max_blocks * block_size
    lengths = [min(max(n, 0), capacity) for n in cache_seqlens]
    if cu_seqlens_q is None:
        first = [i * s_q for i in range(b + 1)]
    else:
        first = np.frombuffer(cu_seqlens_q, np.int32).tolist()
    groups = []
    for requests, pieces in _pieces(first, deterministic):
        passes = []
        for rows, num_rows, num_later in pieces:
            ends = [max(0, lengths[i] - (num_later if causal else 0)) for i in requests]
            if max(ends) > 0:
                passes.append(_pass(rows, ends, num_rows if causal else 1, device))
        if passes:
            slots = _slots(table[requests], [lengths[i] for i in requests], block_size, num_blocks)
            is_run = len(slots) == 1 and bool((np.diff(slots[0]) == 1).all())
            first_slot = int(slots[0, 0]) if is_run else None
            groups.append(_Group(torch.from_numpy(slots).to(device), first_slot, passes))
    return groups


def _pieces(
    first: list[int], deterministic: bool
) -> Iterator[tuple[list[int], list[tuple[slice | list[int], int, int]]]]:
    """Requests to run together; of each piece the rows, how many a request has, how many follow.

    A padded sum may depend on the longest request: deterministic ones are alone.
    """
    counts = [end - start for start, end in pairwise(first)]
    single = [] if deterministic else [i for i, n in enumerate(counts) if n == 1]
    if single:
        index = [first[i] for i in single]
        is_range = index[-1] - index[0] == len(index) - 1
        yield single, [(slice(index[0], index[-1] + 1) if is_range else index, 1, 0)]
    for i, (start, end) in enumerate(pairwise(first)):
        if end - start > 1 or (deterministic and end > start):
            stops = [min(row + QUERY_CHUNK, end) for row in range(start, end, QUERY_CHUNK)]
            pairs = pairwise([start, *stops])
            yield [i], [(slice(row, stop), stop - row, end - stop) for row, stop in pairs]


def _pass(rows: slice | list[int], ends: list[int], num_steps: int, device: torch.device) -> _Pass:
    """Query j of n = num_steps sees the first ends[i] keys of request i, one less each after j."""
    num_keys, smallest = max(ends), min(ends) - (num_steps - 1)
    first_hidden, hidden = max(smallest, 0), None
    if first_hidden < num_keys:
        position = torch.arange(first_hidden, num_keys, device=device)
        steps = torch.arange(num_steps - 1, -1, -1, device=device)
        seen = torch.tensor(ends, device=device)[:, None, None] - steps[:, None]
        hidden = position >= seen
    return _Pass(rows, num_keys, first_hidden, hidden, smallest <= 0)


def _slots(table: np.ndarray, lengths: list[int], block_size: int, num_blocks: int) -> np.ndarray:
    """Slots of the first tokens of each request, -1 after them: int64 [g, s]."""
    longest = max(lengths)
    slots = table[:, : -(-longest // block_size), None] * block_size + np.arange(block_size)
    slots = slots.reshape(len(lengths), -1)[:, :longest]
    is_past = np.arange(longest) >= np.array(lengths)[:, None]
    is_wrong = ~is_past & ((slots < 0) | (slots >= num_blocks * block_size))
    if is_wrong.any():
        rule = f"block_table must hold ids in 0..{num_blocks - 1} where a request has tokens"
        raise ValueError(f"{rule}, got {slots[is_wrong][0] // block_size}")
    return np.where(is_past, -1, slots)


def _keys(
    kv_cache: Tensor, group: _Group, layout: KVLayout | None, block_size: int, q: Tensor
) -> Tensor:
    """The tokens of a group, zeros at slot -1: [g, s, hkv, d] fp32, rounded to q's dtype before."""
    slots = group.slots
    if layout is None:
        found = slots.clamp_min(0)  # zeros replace what is read past a request's end
        keys = kv_cache[found // block_size, found % block_size]
        return keys.masked_fill_((slots < 0)[..., None, None], 0.0).float()
    run = None
    if group.first_slot is not None:
        run = plain_run_ref(kv_cache, group.first_slot, slots.shape[1], layout, block_size)
    if run is None:
        keys = gather_and_dequantize_ref(
            kv_cache, slots, layout=layout, block_size=block_size, dtype=q.dtype
        )
    else:
        keys = run.type_as(q).unsqueeze(0)
    return keys.unsqueeze(2).float()


def _take(x: Tensor, rows: slice | list[int]) -> Tensor:
    return x if rows == slice(0, len(x)) else x[rows]


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
    q: Tensor, keys: Tensor, part: _Pass, attn_sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """`_attend` of keys [g, s, hkv, d]: each key head serves its group of query heads."""
    if part.num_keys < keys.shape[1]:
        keys = keys[:, : part.num_keys]
    hkv = keys.shape[2]
    if hkv == 1:
        return _attend(q, keys.squeeze(2), part, attn_sink, value_dim)
    q_heads = q.chunk(hkv, dim=1)
    sinks = [None] * hkv if attn_sink is None else attn_sink.chunk(hkv)
    pairs = [_attend(q_heads[i], keys[:, :, i], part, sinks[i], value_dim) for i in range(hkv)]
    return torch.cat([out for out, _ in pairs], 1), torch.cat([lse for _, lse in pairs], 1)


def _attend(
    q: Tensor, kv: Tensor, part: _Pass, attn_sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """q [g n, h, d], scaled, n rows for each of kv [g, s, d]: out [g n, h, value_dim] and lse."""
    (t, h, d), (g, s, _) = q.shape, kv.shape
    scores = torch.bmm(q.reshape(g, -1, d), kv.mT).view(t, h, s)
    if part.hidden is not None:
        tail = scores.view(g, -1, h, s)[..., part.first_hidden :]
        tail.masked_fill_(part.hidden.unsqueeze(2), float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    if part.has_empty:  # without keys the maximum is -inf, and -inf less -inf NaN
        largest.clamp_min_(torch.finfo(scores.dtype).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log().add_(largest).squeeze(-1)
    if attn_sink is not None:
        total.add_((attn_sink.unsqueeze(1) - largest).exp_())
    out = torch.bmm(weights.view(g, -1, s), kv[..., :value_dim]).view(t, h, value_dim)
    if part.has_empty:
        total.clamp_min_(1.0)  # a row with keys has a sum of at least 1
    return out.div_(total), lse

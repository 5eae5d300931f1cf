"""Inputs of paged decode, and its formula in fp64: shared by interpreter and GPU tests.

Every slot that no query sees is NaN, every table entry past a request's last block is garbage,
and tensors are slices of larger ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from sparse_decode_cases import stretch_scales
from torch import Tensor

from model1.ops.kv_cache import (
    KVLayout,
    gather_and_dequantize,
    quantize_and_store,
)
from model1.testing.compare import assert_close_rows

GARBAGE_BLOCK = 2147480000
INF = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a kernel is compiled for."""

    h: int
    hkv: int = 1
    d: int
    value_dim: int
    block_size: int
    layout: KVLayout | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = False
    has_sink: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """The arguments of one call, and for each request its queries' rows and its keys."""

    q: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    options: dict[str, Any]
    query_rows: list[slice]  # in q as [t, h, d]
    keys: list[Tensor]  # [s, hkv, d]

    def arguments(self, device: str | None = None) -> dict[str, Any]:
        """Of `paged_decode`, on a device."""
        tensors = {x: getattr(self, x) for x in ("q", "kv_cache", "block_table", "cache_seqlens")}
        return {
            name: like(x, device) if isinstance(x, Tensor) else x
            for name, x in (tensors | self.options).items()
        }


def like(x: Tensor, device: str | None) -> Tensor:
    """The tensor on a device, with its strides, which `to` would not keep; NaN in the gaps."""
    if device is None or x.device.type == device:
        return x
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True) if n)
    gap = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    flat = torch.full((max(size, 1),), gap, dtype=x.dtype, device=device)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def random_case(
    shape: Shape, lengths: list[int], q_lengths: list[int], seed: int, *, ragged: bool = False
) -> Case:
    """A call on the CPU; without `ragged` all q_lengths must be the same."""
    torch.manual_seed(seed)
    b, size = len(lengths), shape.block_size
    max_blocks = max([1, *(-(-n // size) for n in lengths)]) + 1
    table = torch.full((b, max_blocks + 1), GARBAGE_BLOCK, dtype=torch.int32)[:, :max_blocks]
    num_blocks = sum(-(-n // size) for n in lengths) + 2
    order, used = torch.randperm(num_blocks), 0
    for i, n in enumerate(lengths):
        num_used = -(-n // size)
        table[i, :num_used] = order[used : used + num_used]
        used += num_used
    slots = [
        table[i, torch.arange(n) // size].long() * size + torch.arange(n) % size
        for i, n in enumerate(lengths)
    ]
    cache, keys = _filled_cache(shape, num_blocks, slots)
    q, options = _queries(shape, q_lengths, ragged)
    ends = torch.tensor(q_lengths).cumsum(0).tolist()
    return Case(
        q=q,
        kv_cache=cache,
        block_table=table,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        options=options
        | {
            "value_dim": shape.value_dim,
            "softmax_scale": shape.d**-0.5,
            "causal": shape.causal,
            "layout": shape.layout,
            "block_size": size,
            "attn_sink": _random_sink(shape.h) if shape.has_sink else None,
            "empty_lse": INF,
        },
        query_rows=[slice(end - n, end) for end, n in zip(ends, q_lengths, strict=True)],
        keys=keys,
    )


def _filled_cache(
    shape: Shape, num_blocks: int, slots: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    size, layout = shape.block_size, shape.layout
    if layout is None:
        wide = (num_blocks + 1, size, shape.hkv, shape.d)
        cache = torch.full(wide, math.nan, dtype=shape.dtype)[1:]
        rows = cache.flatten(0, 1)
        for slot in slots:
            rows[slot] = torch.randn(len(slot), shape.hkv, shape.d).to(shape.dtype)
        return cache, [rows[slot] for slot in slots]
    step, used = layout.block_step_bytes, layout.block_bytes(size)  # apart by no whole rows
    cache = torch.full((num_blocks, (used // step + 2) * step), 0xFF, dtype=torch.uint8)[:, :used]
    options = {"layout": layout, "block_size": size, "backend": "ref"}
    for slot in slots:
        quantize_and_store(torch.randn(len(slot), layout.d), cache, slot, **options)
        if layout.name == "v32_fp8" and len(slot):
            stretch_scales(cache, slot, layout, size)
    gathered = [gather_and_dequantize(cache, s, dtype=shape.dtype, **options) for s in slots]
    return cache, [keys[:, None] for keys in gathered]


def _queries(shape: Shape, q_lengths: list[int], ragged: bool) -> tuple[Tensor, dict[str, Any]]:
    t, b = sum(q_lengths), len(q_lengths)
    wide = torch.full((t + 1, shape.h + 1, shape.d + 16), math.nan, dtype=shape.dtype)
    q = wide[:t, : shape.h, : shape.d]
    q.copy_(torch.randn(t, shape.h, shape.d))
    if not ragged:
        assert len(set(q_lengths)) <= 1
        return q.unflatten(0, (b, t // b)), {}
    starts = torch.tensor([0, *q_lengths]).cumsum(0).to(torch.int32)
    return q, {"cu_seqlens_q": starts, "max_seqlen_q": max(1, *q_lengths)}


def _random_sink(h: int) -> Tensor:
    """Natural logits, some of them +inf and some -inf."""
    sink = torch.randn(h)
    draw = torch.rand(h)
    return sink.masked_fill(draw < 0.2, INF).masked_fill(draw > 0.8, -INF)


def attend(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """out and lse of the call, with products rounded to dtype: fp64 is the formula."""
    options, value_dim = case.options, case.options["value_dim"]
    q = case.q.flatten(0, -3).to(device, dtype)
    out = torch.zeros(len(q), q.shape[1], value_dim, dtype=dtype, device=device)
    lse = torch.full(q.shape[:2], options["empty_lse"], dtype=torch.float64, device=device)
    sink = options["attn_sink"]
    sink = None if sink is None else sink.to(device, torch.float64)
    for rows, keys in zip(case.query_rows, case.keys, strict=True):
        num_queries, num_keys = rows.stop - rows.start, len(keys)
        if num_queries == 0 or num_keys == 0:
            continue
        k = keys.to(device, dtype)
        q_i = q[rows].unflatten(1, (k.shape[1], -1))  # [j, hkv, group, d]
        logits = torch.einsum("jkgd,skd->jkgs", q_i, k).double().flatten(1, 2)
        limit = torch.full((num_queries,), num_keys, device=device)
        if options["causal"]:
            limit -= num_queries - 1 - torch.arange(num_queries, device=device)
        hidden = (torch.arange(num_keys, device=device) >= limit[:, None])[:, None]
        logits = (logits * options["softmax_scale"]).masked_fill(hidden, -INF)
        row_lse = logits.logsumexp(-1)
        total = row_lse if sink is None else torch.logaddexp(row_lse, sink)
        weights = torch.exp(logits - total.masked_fill(total == -INF, 0.0)[..., None]).to(dtype)
        weights = weights.unflatten(1, (k.shape[1], -1))
        out[rows] = torch.einsum("jkgs,skd->jkgd", weights, k[..., :value_dim]).flatten(1, 2)
        lse[rows] = row_lse.masked_fill(row_lse == -INF, options["empty_lse"])
    shape = case.q.shape[:-1]
    return out.view(*shape, value_dim), lse.view(shape)


def check(case: Case, got: tuple[Tensor, Tensor], what: str) -> None:
    """The tolerance rule of every kernel; what: named in the failure."""
    out, lse = got
    want_out, want_lse = attend(case, torch.float64, out.device)
    base_out, base_lse = want_out, want_lse
    if case.q.dtype != torch.float32:
        base_out, base_lse = attend(case, case.q.dtype, out.device)
    assert (out.dtype, lse.dtype) == (case.q.dtype, torch.float32), what
    try:
        assert_close_rows(out, base_out, want_out)
        assert_close_rows(lse[..., None], base_lse[..., None], want_lse[..., None])
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None
    assert not out[want_lse == case.options["empty_lse"]].any(), what


_LAYOUTS = [
    None, None, KVLayout("model1_fp8", 192, 32), KVLayout("v32_fp8", 256, 64),
    KVLayout("bf16", 96, 24),
]  # fmt: skip


def drawn_shape(seed: int) -> Shape:
    """Any heads, widths and block size; each shape is some compilations."""
    draw = Random(seed)
    layout = draw.choice(_LAYOUTS)
    hkv = 1 if layout else draw.choice([1, 2, 3, 8])
    d = layout.d if layout else draw.choice([40, 72, 100, 192, 320, 576])
    return Shape(
        h=hkv * draw.choice([1, 3, 7, 16, 24, 40]),
        hkv=hkv,
        d=d,
        value_dim=draw.randint(d // 2, d),
        block_size=draw.choice([1, 3, 16, 53, 64, 100, 256]),
        layout=layout,
        dtype=draw.choice([torch.bfloat16, torch.bfloat16, torch.float16]),
        causal=draw.random() < 0.5,
        has_sink=draw.random() < 0.5,
    )


def drawn_case(
    shape: Shape, seed: int, *, longest: int, may_be_ragged: bool = True
) -> tuple[Case, bool]:
    """A random call for a shape, and whether to ask for deterministic bits."""
    draw = Random(seed)
    b, ragged = draw.randint(1, 6), draw.random() < 0.3 and may_be_ragged
    lengths = [0 if draw.random() < 0.1 else draw.randint(1, longest) for _ in range(b)]
    s_q = draw.randint(1, 4)
    q_lengths = [draw.randint(0, 4) if ragged else s_q for _ in range(b)]
    case = random_case(shape, lengths, q_lengths, seed, ragged=ragged)
    return case, draw.random() < 0.25


def without(case: Case, **options: Any) -> Case:
    """The same call with other options."""
    return dataclasses.replace(case, options=case.options | options)

"""The shapes that operators are measured on, as calls of the public `flash_mla` interface.

Work is counted as FlashMLA's benchmarks count it: entries that are -1 are counted, scale bytes of
MODEL1 are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_inputs import (
    block_tables,
    cache_view,
    normal,
    paged_cache,
    random_slots,
    varied_lengths,
)
from model1.ops.kv_cache import KVLayout

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
BATCHES = (2, 64, 74, 128, 148, 256)


@dataclass(frozen=True, slots=True)
class Work:
    """A prepared call: bind it to a module with the `flash_mla` interface, then time it."""

    bind: Callable[[Any], Callable[[], tuple[Tensor, ...]]]
    flop: float
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table; `build` allocates its inputs."""

    operator: str
    name: str
    build: Callable[[torch.device], Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """A sparse decode: the main cache and, with extra_topk, a second one."""

    layout: KVLayout
    h: int
    topk: int
    s_kv: int
    page: int
    extra_topk: int = 0
    extra_page: int = 1
    has_lengths: bool = False
    s_q: int = 2


def sparse_decode(b: int, shape: DecodeShape, device: torch.device) -> Work:
    """A call of flash_mla_with_kvcache with indices."""
    torch.manual_seed(1)
    layout, d = shape.layout, shape.layout.d
    q = normal(b, shape.s_q, shape.h, d, dtype=torch.bfloat16, device=device)
    arguments: dict[str, Any] = {"attn_sink": torch.randn(shape.h, device=device)}
    if layout.name == "v32_fp8" and not shape.extra_topk:
        arguments = {}  # FlashMLA's V3.2 benchmark has no sink
    num_keys = b * shape.s_q * shape.topk
    cache, slots = _scope(b, shape.s_q, shape.topk, shape.s_kv, shape.page, layout, device)
    if shape.extra_topk:
        extra, extra_slots = _scope(
            b, shape.s_q, shape.extra_topk, shape.s_kv, shape.extra_page, layout, device
        )
        arguments |= {"extra_k_cache": extra, "extra_indices_in_kvcache": extra_slots}
        if shape.has_lengths:
            lengths = torch.randint(shape.extra_topk + 1, (b,), dtype=torch.int32, device=device)
            arguments["extra_topk_length"] = lengths
            num_keys += shape.s_q * int(lengths.sum())
        else:
            num_keys += b * shape.s_q * shape.extra_topk

    def bind(module: Any) -> Callable[[], tuple[Tensor, ...]]:
        holder, num_splits = module.get_mla_metadata()
        return lambda: module.flash_mla_with_kvcache(
            q, cache, None, None, 512, holder, num_splits, d**-0.55, False, True, slots, **arguments
        )

    token_bytes = 576 if layout.name == "model1_fp8" else 656
    query_bytes = 2 * b * shape.s_q * shape.h * (d + 512)
    return Work(bind, 2.0 * shape.h * num_keys * (d + 512), num_keys * token_bytes + query_bytes)


def _scope(
    b: int, s_q: int, topk: int, s_kv: int, page: int, layout: KVLayout, device: torch.device
) -> tuple[Tensor, Tensor]:
    lengths = varied_lengths(b, s_kv, s_q, device)
    table, num_blocks = block_tables(lengths, page)
    cache = paged_cache(num_blocks, page, layout, device)
    return cache_view(cache, page, layout), random_slots(lengths, s_q, topk, table, page)


def sparse_prefill(
    d: int, h: int, topk: int, s_kv: int, device: torch.device, *, s_q: int = 4096
) -> Work:
    """A call of flash_mla_sparse_fwd."""
    torch.manual_seed(1)
    q = normal(s_q, h, d, dtype=torch.bfloat16, device=device, scale=0.1)
    kv = normal(s_kv, 1, d, dtype=torch.bfloat16, device=device, scale=0.1)
    rows = [torch.randperm(s_kv, device=device)[:topk] for _ in range(s_q)]
    indices = torch.stack(rows).view(s_q, 1, topk).to(torch.int32)
    sink = torch.randn(h, device=device)

    def bind(module: Any) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: module.flash_mla_sparse_fwd(q, kv, indices, sm_scale=d**-0.5, attn_sink=sink)

    num_bytes = 2 * (q.numel() + kv.numel() + s_q * h * 512) + 4 * indices.numel()
    return Work(bind, 2.0 * h * (d + 512) * s_q * topk, num_bytes)


def dense_decode(
    b: int, s_q: int, h: int, s_k: int, device: torch.device, *, is_varied: bool = True
) -> Work:
    """A call of flash_mla_with_kvcache with a block table: bf16, pages of 64, one KV head."""
    torch.manual_seed(1)
    fixed = torch.full((b,), s_k, dtype=torch.int32, device=device)
    lengths = varied_lengths(b, s_k, s_q, device) if is_varied else fixed
    table, num_blocks = block_tables(lengths, 64)
    q = normal(b, s_q, h, 576, dtype=torch.bfloat16, device=device)
    pool = normal(512, 64, 1, 576, dtype=torch.bfloat16, device=device, scale=0.1)
    cache = pool[torch.randint(512, (num_blocks,), device=device)]

    def bind(module: Any) -> Callable[[], tuple[Tensor, ...]]:
        holder, num_splits = module.get_mla_metadata()
        return lambda: module.flash_mla_with_kvcache(
            q, cache, table, lengths, 512, holder, num_splits, causal=s_q > 1
        )

    num_keys = int(lengths.sum())
    num_bytes = 2 * (num_keys * 576 + b * s_q * h * (576 + 512))
    return Work(bind, 2.0 * s_q * h * num_keys * (576 + 512), num_bytes)


_CONFIGS = {
    "CONFIG1": DecodeShape(
        layout=MODEL1, h=64, topk=128, s_kv=16384, page=256, extra_topk=512, extra_page=64
    ),
    "CONFIG2": DecodeShape(
        layout=MODEL1, h=128, topk=128, s_kv=16384, page=256, extra_topk=1024, extra_page=64
    ),
    "CONFIG3": DecodeShape(
        layout=MODEL1, h=64, topk=128, s_kv=16384, page=256, extra_topk=1024, extra_page=2,
        has_lengths=True,
    ),
    "CONFIG4": DecodeShape(
        layout=MODEL1, h=128, topk=128, s_kv=16384, page=256, extra_topk=1024, extra_page=2,
        has_lengths=True,
    ),
}  # fmt: skip
_V32 = DecodeShape(layout=V32, h=128, topk=2048, s_kv=32768, page=64)


def cases() -> Iterator[Case]:
    """Every case, cheapest operators first."""
    for name, shape in _CONFIGS.items():
        for b in BATCHES:
            build = functools.partial(sparse_decode, b, shape)
            yield Case("sparse_decode", f"MODEL1 {name} b={b}", build)
    for b in (2, 64, 74, 128):
        yield Case("sparse_decode", f"V32 h=128 b={b}", functools.partial(sparse_decode, b, _V32))
    for d, h, topk in ((512, 64, 512), (512, 128, 1024), (576, 128, 2048), (576, 64, 2048)):
        for s_kv in (8192, 65536):
            build = functools.partial(sparse_prefill, d, h, topk, s_kv)
            yield Case("sparse_prefill", f"d={d} h={h} topk={topk} s_kv={s_kv}", build)
    for h in (16, 128):
        for s_q, s_k in ((1, 4096), (1, 8192), (2, 4096), (2, 8192)):
            build = functools.partial(dense_decode, 132, s_q, h, s_k)
            yield Case("dense_decode", f"h={h} b=132 s_q={s_q} s_k={s_k}", build)
        build = functools.partial(dense_decode, 1, 1, h, 65536, is_varied=False)
        yield Case("dense_decode", f"h={h} b=1 s_q=1 s_k=65536", build)

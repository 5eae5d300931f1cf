"""Sparse decode: FlashMLA's benchmark shapes, and the price of being deterministic.

Work is counted as FlashMLA's benchmarks count it: operations of every entry, also of -1; bytes of
every distinct entry of a cache once, -1 being one of them, without the scale bytes of MODEL1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import (
    MODEL1,
    V32,
    block_tables,
    cache_view,
    normal,
    paged_cache,
    random_slots,
    varied_lengths,
)
from model1.ops.kv_cache import KVLayout
from model1.ops.sparse_decode import sparse_decode

OPERATOR = "sparse_decode"
TESTS = ("tests/ops/test_sparse_decode*.py", "tests/test_flash_mla_gpu.py")
BATCHES = (2, 64, 74, 128, 148, 256)
VALUE_DIM = 512
OURS = "model1.flash_mla"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
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


class Scope(NamedTuple):
    """A cache and the slots to read."""

    cache: Tensor  # uint8 [num_blocks, block stride]
    slots: Tensor  # [b, s_q, topk] int32


class Inputs(NamedTuple):
    """The tensors of one call."""

    q: Tensor
    attn_sink: Tensor | None
    main: Scope
    extra: Scope | None
    extra_length: Tensor | None


def inputs(b: int, shape: Shape, device: torch.device) -> Inputs:
    """Random inputs, the same every time on one kind of device."""
    torch.manual_seed(1)
    q = normal(b, shape.s_q, shape.h, shape.layout.d, dtype=torch.bfloat16, device=device)
    sink = torch.randn(shape.h, device=device)
    if shape.layout.name == "v32_fp8" and not shape.extra_topk:
        sink = None  # FlashMLA's V3.2 benchmark has none
    main = _scope(b, shape, shape.topk, shape.page, device)
    extra = lengths = None
    if shape.extra_topk:
        extra = _scope(b, shape, shape.extra_topk, shape.extra_page, device)
        if shape.has_lengths:
            lengths = torch.randint(shape.extra_topk + 1, (b,), dtype=torch.int32, device=device)
    return Inputs(q, sink, main, extra, lengths)


def _scope(b: int, shape: Shape, topk: int, page: int, device: torch.device) -> Scope:
    lengths = varied_lengths(b, shape.s_kv, shape.s_q, device)
    table, num_blocks = block_tables(lengths, page)
    cache = paged_cache(num_blocks, page, shape.layout, device)
    return Scope(cache, random_slots(lengths, shape.s_q, topk, table, page))


def cost(x: Inputs, shape: Shape) -> tuple[float, float]:
    """Floating-point operations and bytes."""
    b, d = len(x.q), shape.layout.d
    num_keys = b * shape.s_q * (shape.topk + (0 if shape.has_lengths else shape.extra_topk))
    if x.extra_length is not None:
        num_keys += shape.s_q * int(x.extra_length.sum())
    token_bytes = 576 if shape.layout.name == "model1_fp8" else 656
    num_slots = x.main.slots.unique().numel()
    if x.extra is not None:
        num_slots += _counted(x.extra.slots, x.extra_length).unique().numel()
    query_bytes = 2 * b * shape.s_q * shape.h * (d + VALUE_DIM)
    flop = 2.0 * shape.h * num_keys * (d + VALUE_DIM)
    return flop, num_slots * token_bytes + query_bytes


def _counted(slots: Tensor, length: Tensor | None) -> Tensor:
    """The entries of all rows that are below their request's length."""
    if length is None:
        return slots
    position = torch.arange(slots.shape[-1], device=slots.device)
    return slots[(position < length[:, None, None]).expand_as(slots)]


def interface_work(b: int, shape: Shape, device: torch.device) -> Work:
    """A call of flash_mla_with_kvcache with indices."""
    x = inputs(b, shape, device)
    cache = cache_view(x.main.cache, shape.page, shape.layout)
    arguments: dict[str, Any] = {} if x.attn_sink is None else {"attn_sink": x.attn_sink}
    if x.extra is not None:
        arguments["extra_k_cache"] = cache_view(x.extra.cache, shape.extra_page, shape.layout)
        arguments["extra_indices_in_kvcache"] = x.extra.slots
    if x.extra_length is not None:
        arguments["extra_topk_length"] = x.extra_length

    def bind(module: Any) -> Call:
        holder, num_splits = module.get_mla_metadata()
        scale = shape.layout.d**-0.55
        missing = -shape.h % 64 if module.__name__ != OURS else 0

        def call() -> tuple[Tensor, ...]:
            q, given = x.q, arguments
            if missing:  # a peer takes 64 heads or 128: its caller pads
                q = pad(q, (0, 0, 0, missing))
                if x.attn_sink is not None:
                    given = arguments | {"attn_sink": pad(x.attn_sink, (0, missing))}
            out, lse = module.flash_mla_with_kvcache(
                q, cache, None, None, VALUE_DIM, holder, num_splits, scale, False, True,
                x.main.slots, **given,
            )  # fmt: skip
            return out[:, :, : shape.h], lse[:, : shape.h]

        return call

    rivals = {}
    if x.q.is_cuda:
        rivals = {f"our {name}": lambda name=name: _own_call(x, shape, backend=name)
                  for name in ("hopper", "triton")}  # fmt: skip
    return Work(bind, *cost(x, shape), rivals)


def _own_call(x: Inputs, shape: Shape, **options: Any) -> Call:
    return functools.partial(
        sparse_decode, x.q, x.main.cache, x.main.slots, layout=shape.layout,
        block_size=shape.page, value_dim=VALUE_DIM, softmax_scale=shape.layout.d**-0.55,
        extra_kv_cache=None if x.extra is None else x.extra.cache,
        extra_topk_indices=None if x.extra is None else x.extra.slots,
        extra_block_size=None if x.extra is None else shape.extra_page,
        extra_topk_length=x.extra_length, attn_sink=x.attn_sink, **options,
    )  # fmt: skip


def deterministic_work(b: int, shape: Shape, device: torch.device) -> Work:
    """Our operator as it is by default and, its rival, deterministic."""
    x = inputs(b, shape, device)
    run, rival = _own_call(x, shape), _own_call(x, shape, deterministic=True)
    return own_work(run, *cost(x, shape), {"deterministic": lambda: rival})


_MODEL1 = functools.partial(
    Shape, layout=MODEL1, topk=128, s_kv=16384, page=256, extra_topk=1024, extra_page=2
)
CONFIGS = {
    "CONFIG1": _MODEL1(h=64, extra_topk=512, extra_page=64),
    "CONFIG2": _MODEL1(h=128, extra_page=64),
    "CONFIG3": _MODEL1(h=64, has_lengths=True),
    "CONFIG4": _MODEL1(h=128, has_lengths=True),
}
_V32 = Shape(layout=V32, h=128, topk=2048, s_kv=32768, page=64)
_PEAK = functools.partial(Shape, topk=16384, s_kv=32768, page=64)
PEAKS = {
    "MODEL1 peak h=64": _PEAK(layout=MODEL1, h=64),
    "MODEL1 peak h=128": _PEAK(layout=MODEL1, h=128),
    "V32 peak h=128": _PEAK(layout=V32, h=128),
}


def cases() -> Iterator[Case]:
    """FlashMLA's shapes, fewer heads than it takes, and deterministic mode."""
    for name, shape in CONFIGS.items():
        for b in BATCHES:
            build = functools.partial(interface_work, b, shape)
            yield Case(OPERATOR, f"MODEL1 {name} b={b}", build)
    for b in (2, 64, 74, 128):
        yield Case(OPERATOR, f"V32 h=128 b={b}", functools.partial(interface_work, b, _V32))
    for name, shape in PEAKS.items():
        yield Case(OPERATOR, f"{name} b=148", functools.partial(interface_work, 148, shape))
    for h, b in itertools.product((8, 16, 32), (64, 128)):
        few = replace(CONFIGS["CONFIG1"], h=h)
        yield Case(OPERATOR, f"MODEL1 h={h} b={b}", functools.partial(interface_work, b, few))
    for name, shape in (("MODEL1 CONFIG1", CONFIGS["CONFIG1"]), ("V32 h=128", _V32)):
        for b in (1, 64, 128):
            build = functools.partial(deterministic_work, b, shape)
            yield Case(OPERATOR, f"deterministic {name} b={b}", build)

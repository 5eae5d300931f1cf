"""Selector, remainder and sparse attention over paged low-rank vectors; rank 64 beside MODEL1.

The bandwidth limit of a scan is one reading of the low-rank vectors and rotary keys. With 64 heads
the selector reads them twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases.case import Case, Work, own_work
from benchmarks.kernel_inputs import block_tables, normal, paged_cache
from model1.ops.kv_cache import KVLayout
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.selector import lightning_topk, lowrank_topk

OPERATOR = "selector"
TESTS = ("tests/ops/test_lowrank_attention*.py", "tests/ops/test_lightning.py")
LAYOUT = KVLayout("model1_fp8", 448, 64)
RANK, TOPK, WINDOW, PAGE = 64, 2048, 128, 64


def inputs(b: int, h: int, s: int, device: torch.device) -> dict[str, Any]:
    """One query for each of b requests of s tokens, the same every time on one kind of device."""
    torch.manual_seed(1)
    lengths = torch.full((b,), s, dtype=torch.int32, device=device)
    table, num_blocks = block_tables(lengths, PAGE)
    return {
        "scan_q": normal(b, h, RANK + 64, dtype=torch.bfloat16, device=device, scale=0.3),
        "index_cache": normal(num_blocks * PAGE, RANK, dtype=torch.bfloat16, device=device),
        "kv_cache": paged_cache(num_blocks, PAGE, LAYOUT, device), "block_table": table,
        "cu_seqlens_q": torch.arange(b + 1, dtype=torch.int32, device=device),
        "max_seqlen_q": 1, "key_end": lengths, "max_seqlen": s, "layout": LAYOUT,
        "block_size": PAGE,
    }  # fmt: skip


def cost(b: int, h: int, s: int, passes: int) -> tuple[float, float]:
    """Floating-point operations of so many products with the keys; bytes of one reading."""
    return 2.0 * passes * b * h * s * (RANK + 64), 2.0 * b * s * (RANK + 64)


def choice(b: int, h: int, s: int, device: torch.device) -> Work:
    """`lowrank_topk`, and its deterministic mode."""
    count = torch.full((b,), TOPK, dtype=torch.int32, device=device)
    run = functools.partial(
        lowrank_topk, **inputs(b, h, s, device), core_count=count, topk=TOPK, sliding_window=WINDOW
    )
    rival = functools.partial(run, deterministic=True)
    return own_work(run, *cost(b, h, s, 2), {"deterministic": lambda: rival})


def rest(b: int, h: int, s: int, device: torch.device) -> Work:
    """`lowrank_remainder` of a random core."""
    core = torch.rand(b, s, device=device).topk(TOPK).indices.int()
    run = functools.partial(
        lowrank_remainder, **inputs(b, h, s, device), core_indices=core, rotary_value=True
    )
    return own_work(run, *cost(b, h, s, 2))


def attention(b: int, h: int, s: int, device: torch.device) -> Work:
    """`lowrank_attention`: the bytes are those of one scan and of the core."""
    call = inputs(b, h, s, device)
    del call["scan_q"]
    basis = torch.linalg.qr(torch.randn(448, RANK, device=device))[0].T.bfloat16()
    run = functools.partial(
        lowrank_attention, normal(b, h, 512, dtype=torch.bfloat16, device=device), **call,
        core_count=torch.full((b,), TOPK, dtype=torch.int32, device=device), basis=basis,
        mean=torch.zeros(448, dtype=torch.bfloat16, device=device), topk=TOPK,
        sliding_window=WINDOW, rotary_value=True, value_dim=512, softmax_scale=512**-0.5,
    )  # fmt: skip
    flop, num_bytes = cost(b, h, s, 3)
    core_flop, core_bytes = 2.0 * b * h * TOPK * 1024, b * TOPK * LAYOUT.bytes_per_token
    return own_work(run, flop + core_flop, num_bytes + core_bytes)


def lightning(b: int, h: int, s: int, device: torch.device) -> Work:
    """`lightning_topk` with V3.2's 128 channels."""
    call = inputs(b, h, s, device)
    rows: dict[str, Any] = {
        n: call[n] for n in ("block_table", "cu_seqlens_q", "max_seqlen_q", "key_end")
    }
    keys = normal(len(call["index_cache"]), 128, dtype=torch.bfloat16, device=device)
    q = normal(b, h, 128, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
    index_cache = keys.to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.ones(len(keys), device=device)
    weights = torch.randn(b, h, device=device)

    def run() -> tuple[torch.Tensor, ...]:
        chosen = lightning_topk(
            q, weights, index_cache, scale, **rows, topk=TOPK, max_seqlen=s, block_size=PAGE
        )
        return (chosen,)

    return own_work(run, 2.0 * b * h * s * 128, b * s * (128.0 + 4.0))


def cases() -> Iterator[Case]:
    """64k and 128k positions, batch 1 and 16, by operator."""
    for name, work, heads in (
        ("lowrank_topk", choice, (16, 64)),
        ("lowrank_remainder", rest, (16, 64)),
        ("lowrank_attention", attention, (64,)),
        ("lightning_topk", lightning, (64,)),
    ):
        for h in heads:
            for s in (65536, 131072):
                for b in (1, 16):
                    build = functools.partial(work, b, h, s)
                    yield Case(OPERATOR, f"{name} h={h} b={b} s={s}", build)

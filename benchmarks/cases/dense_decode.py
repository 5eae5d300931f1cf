"""Dense decode by block table: FlashMLA's shapes, and the price of being deterministic."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import block_tables, normal, varied_lengths
from model1.ops.paged_decode import paged_decode

OPERATOR = "dense_decode"
TESTS = ("tests/ops/test_paged_decode*.py", "tests/test_flash_mla_gpu.py")
D, VALUE_DIM, PAGE = 576, 512, 64


class Inputs(NamedTuple):
    """The tensors of one call: bf16, pages of 64, one KV head."""

    q: Tensor
    cache: Tensor
    table: Tensor
    lengths: Tensor


def inputs(
    b: int, s_q: int, h: int, s_k: int, device: torch.device, *, is_varied: bool = True
) -> Inputs:
    """Random inputs, the same every time on one kind of device."""
    torch.manual_seed(1)
    fixed = torch.full((b,), s_k, dtype=torch.int32, device=device)
    lengths = varied_lengths(b, s_k, s_q, device) if is_varied else fixed
    table, num_blocks = block_tables(lengths, PAGE)
    q = normal(b, s_q, h, D, dtype=torch.bfloat16, device=device)
    pool = normal(512, PAGE, 1, D, dtype=torch.bfloat16, device=device, scale=0.1)
    return Inputs(q, pool[torch.randint(512, (num_blocks,), device=device)], table, lengths)


def cost(x: Inputs) -> tuple[float, float]:
    """Floating-point operations and bytes."""
    b, s_q, h, _ = x.q.shape
    num_keys = int(x.lengths.sum())
    num_bytes = 2 * (num_keys * D + b * s_q * h * (D + VALUE_DIM))
    return 2.0 * s_q * h * num_keys * (D + VALUE_DIM), num_bytes


def interface_work(
    b: int, s_q: int, h: int, s_k: int, device: torch.device, *, is_varied: bool = True
) -> Work:
    """A call of flash_mla_with_kvcache with a block table."""
    x = inputs(b, s_q, h, s_k, device, is_varied=is_varied)

    def bind(module: Any) -> Call:
        holder, num_splits = module.get_mla_metadata()
        return lambda: module.flash_mla_with_kvcache(
            x.q, x.cache, x.table, x.lengths, VALUE_DIM, holder, num_splits, causal=s_q > 1
        )

    return Work(bind, *cost(x))


def deterministic_work(
    b: int, s_q: int, h: int, s_k: int, device: torch.device, *, is_varied: bool = True
) -> Work:
    """Our operator as it is by default and, its rival, deterministic."""
    x = inputs(b, s_q, h, s_k, device, is_varied=is_varied)
    run = functools.partial(
        paged_decode, *x, value_dim=VALUE_DIM, softmax_scale=D**-0.5, causal=s_q > 1
    )
    rival = functools.partial(run, deterministic=True)
    return own_work(run, *cost(x), {"deterministic": lambda: rival})


def cases() -> Iterator[Case]:
    """FlashMLA's shapes, one long request, then deterministic mode."""
    for h in (16, 128):
        for s_q, s_k in ((1, 4096), (1, 8192), (2, 4096), (2, 8192)):
            build = functools.partial(interface_work, 132, s_q, h, s_k)
            yield Case(OPERATOR, f"h={h} b=132 s_q={s_q} s_k={s_k}", build)
        build = functools.partial(interface_work, 1, 1, h, 65536, is_varied=False)
        yield Case(OPERATOR, f"h={h} b=1 s_q=1 s_k=65536", build)
    for h in (16, 128):
        build = functools.partial(deterministic_work, 132, 1, h, 8192)
        yield Case(OPERATOR, f"deterministic h={h} b=132 s_q=1 s_k=8192", build)
        build = functools.partial(deterministic_work, 1, 1, h, 65536, is_varied=False)
        yield Case(OPERATOR, f"deterministic h={h} b=1 s_q=1 s_k=65536", build)

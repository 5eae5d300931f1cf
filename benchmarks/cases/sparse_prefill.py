"""Sparse prefill: FlashMLA's forward shapes, and the backward, which FlashMLA does not have."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.sparse_prefill import sparse_prefill

OPERATOR = "sparse_prefill"
TESTS = ("tests/ops/test_sparse_prefill*.py", "tests/test_flash_mla_gpu.py")
VALUE_DIM = 512
_SHAPES = ((512, 64, 512), (512, 128, 1024), (576, 128, 2048), (576, 64, 2048))  # d, h, topk


def inputs(
    d: int, h: int, topk: int, s_kv: int, s_q: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [s_q, h, d], kv [s_kv, d], distinct random rows [s_q, topk] and a sink [h]."""
    torch.manual_seed(1)
    q = normal(s_q, h, d, dtype=torch.bfloat16, device=device, scale=0.1)
    kv = normal(s_kv, d, dtype=torch.bfloat16, device=device, scale=0.1)
    rows = [torch.randperm(s_kv, device=device)[:topk] for _ in range(s_q)]
    return q, kv, torch.stack(rows).to(torch.int32), torch.randn(h, device=device)


def forward_work(
    d: int, h: int, topk: int, s_kv: int, device: torch.device, *, s_q: int = 4096
) -> Work:
    """A call of flash_mla_sparse_fwd."""
    q, kv, rows, sink = inputs(d, h, topk, s_kv, s_q, device)
    kv, rows = kv.unsqueeze(1), rows.unsqueeze(1)

    def bind(module: Any) -> Call:
        return lambda: module.flash_mla_sparse_fwd(q, kv, rows, sm_scale=d**-0.5, attn_sink=sink)

    num_bytes = 2 * (q.numel() + kv.numel() + s_q * h * VALUE_DIM) + 4 * rows.numel()
    return Work(bind, 2.0 * h * (d + VALUE_DIM) * s_q * topk, num_bytes)


def backward_work(
    d: int, h: int, topk: int, s_kv: int, device: torch.device, *, s_q: int = 4096
) -> Work:
    """The gradients of q, kv and the sink alone; its rival sums those of kv in a fixed order."""
    q, kv, rows, sink = inputs(d, h, topk, s_kv, s_q, device)
    leaves = [x.requires_grad_() for x in (q, kv, sink)]
    dout = normal(s_q, h, VALUE_DIM, dtype=torch.bfloat16, device=device)

    def prepare(deterministic: bool) -> Call:
        out = sparse_prefill(
            q, kv, rows, value_dim=VALUE_DIM, softmax_scale=d**-0.5, attn_sink=sink,
            deterministic=deterministic,
        ).out  # fmt: skip
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    # q and its gradient, out and dout, kv and its gradient
    num_bytes = 2 * (2 * q.numel() + 2 * dout.numel() + 2 * kv.numel()) + 4 * rows.numel()
    flop = 2.0 * h * (3 * d + 2 * VALUE_DIM) * s_q * topk
    rivals = {"deterministic": functools.partial(prepare, True)}
    return own_work(prepare(False), flop, num_bytes, rivals)


def cases() -> Iterator[Case]:
    """Forward over short and long contexts, backward over short ones."""
    for d, h, topk in _SHAPES:
        for s_kv in (8192, 65536):
            build = functools.partial(forward_work, d, h, topk, s_kv)
            yield Case(OPERATOR, f"d={d} h={h} topk={topk} s_kv={s_kv}", build)
    for d, h, topk in _SHAPES:
        build = functools.partial(backward_work, d, h, topk, 8192)
        yield Case(OPERATOR, f"backward d={d} h={h} topk={topk} s_kv=8192", build)

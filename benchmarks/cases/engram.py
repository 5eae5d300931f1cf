"""Engram's gate, its convolution and the gather of stored rows, all bound by memory.

Targets: the gate at 90 % of the copy bandwidth forward and 88 % backward, the gather from a table
of 20 GB at 70 % of the bytes a second that random reads of 264 bytes reach. The rivals of the
gather write a row's 264 bytes where it writes 512.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from model1.ops.engram import (
    RowStore,
    engram_causal_conv,
    engram_gate,
    row_adam_step,
    sum_equal_rows,
)

OPERATOR = "engram"
TESTS = ("tests/ops/test_engram_*.py",)
TABLE_BYTES = 20 * 10**9
ROW_BYTES = 264  # 256 channels in 8 bits and their scales
ROWS_PER_TOKEN = 24  # three orders of eight heads
_CHUNK_ROWS = 1 << 20
# Rows are asked for at this many places in turn, more than a cache holds. The table repeats itself
# there, so that any two calls have the same result.
_PLACES = 8


def gate_work(
    step: Literal["forward", "backward"], t: int, n: int, d: int, device: torch.device
) -> Work:
    """The gate of t tokens in bf16, key and value from one projection as the model has them.

    Bytes are those of h, key, value and out (forward), and of these three, their gradients and
    out's (backward); the weights and the numbers per token are left out.
    """
    torch.manual_seed(1)
    joint = torch.randn(t, n + 1, d, dtype=torch.bfloat16, device=device)
    h = torch.randn(t, n, d, dtype=torch.bfloat16, device=device)
    weight = torch.rand(n, d, device=device) + 0.5
    leaves = [x.requires_grad_(step == "backward") for x in (h, joint[:, :-1], joint[:, -1])]
    leaves.append(weight.requires_grad_(step == "backward"))
    grad = torch.randn_like(h.detach())

    def bind(backend: str) -> Call:
        if step == "forward":
            return lambda: engram_gate(*leaves, eps=1e-6, backend=backend)
        out, _ = engram_gate(*leaves, eps=1e-6, backend=backend)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    num_vectors = 3 * n + 1 if step == "forward" else 5 * n + 2
    rivals = {"pytorch": lambda: bind("ref")}
    return own_work(bind("auto"), 0.0, 2 * t * d * num_vectors, rivals)


def conv_work(
    step: Literal["forward", "backward"], t: int, n: int, d: int, device: torch.device
) -> Work:
    """The short convolution of t tokens of two documents in bf16, four taps a trigram apart.

    Bytes are those of x and out (forward), and of x, out's gradient and x's (backward).
    """
    torch.manual_seed(1)
    x = torch.randn(t, n * d, dtype=torch.bfloat16, device=device)
    weights = [torch.randn(n * d, 4, device=device), torch.rand(n, d, device=device) + 0.5]
    leaves = [y.requires_grad_(step == "backward") for y in (x, *weights)]
    positions = torch.arange(t, device=device) % (t // 2)
    grad = torch.randn_like(x.detach())

    def bind(backend: str) -> Call:
        def forward() -> Tensor:
            return engram_causal_conv(
                leaves[0], positions, *leaves[1:], dilation=3, eps=1e-5, backend=backend
            )

        if step == "forward":
            return lambda: (forward(),)
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    num_vectors = n * (2 if step == "forward" else 3)
    return own_work(bind("auto"), 0.0, 2 * t * d * num_vectors, {"pytorch": lambda: bind("ref")})


def row_step_work(t: int, device: torch.device) -> Work:
    """Adam in fp32 on all rows that t tokens read of a table of 4 GB, their gradients added up.

    Bytes are those of the gradients, read, and of rows and moments, read and written.
    """
    torch.manual_seed(1)
    num_rows, num_read = 4 * 10**9 // 1024, t * ROWS_PER_TOKEN
    table, mean, square = (torch.zeros(num_rows, 256, device=device) for _ in range(3))
    steps = torch.zeros(num_rows, 1, device=device)
    rows = torch.randint(num_rows, (num_read,), device=device)
    unique, sums = sum_equal_rows(rows, torch.randn(num_read, 256, device=device))
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-10}

    def bind(backend: str) -> Call:
        def call() -> tuple[Tensor, ...]:
            row_adam_step(table, mean, square, steps, unique, sums, **options, backend=backend)
            return (steps,)

        return call

    num_bytes = len(unique) * 7 * 1024
    return own_work(bind("auto"), 0.0, num_bytes, {"pytorch": lambda: bind("ref")})


def gather_work(t: int, device: torch.device, *, table_bytes: int = TABLE_BYTES) -> Work:
    """All rows of t tokens from a large 8-bit table, in bf16, beside reads of their bytes alone.

    Every scale is 1, so that the codes, which the rival gives, are the rows. Bytes are those of
    the rows and their numbers, read, and of the result, written.
    """
    torch.manual_seed(1)
    num_rows = table_bytes // ROW_BYTES
    data = torch.empty(num_rows, 256, dtype=torch.uint8, device=device)
    period = min(num_rows // _PLACES, _CHUNK_ROWS)
    pool = torch.randint(0x7F, (period, 256), dtype=torch.uint8, device=device)
    for chunk in data.split(period):
        chunk.copy_(pool[: len(chunk)])
    scale = torch.full((num_rows, 8), 127, dtype=torch.uint8, device=device)
    store = RowStore("fp8", data.view(torch.float8_e4m3fn), scale)
    num_wanted = t * ROWS_PER_TOKEN
    wanted = torch.randint(num_rows - (_PLACES - 1) * period, (1, num_wanted), device=device)
    wanted = wanted + period * torch.arange(_PLACES, device=device)[:, None]

    def bind() -> Call:
        turns = itertools.cycle(wanted)
        return lambda: (store.gather(next(turns), dtype=torch.bfloat16),)

    def bind_copy() -> Call:
        turns = itertools.cycle(wanted)
        words = data.view(torch.int64), scale.view(torch.int64)  # PyTorch reads one at a time

        def call() -> tuple[Tensor, ...]:
            rows = next(turns)
            codes, scales = (x.index_select(0, rows) for x in words)
            return codes.view(torch.float8_e4m3fn), scales.view(torch.uint8)

        return call

    num_bytes = num_wanted * (ROW_BYTES + 8 + 2 * 256)
    return own_work(
        bind(),
        0.0,
        num_bytes,
        {"index_select": bind_copy, "264-byte reads": lambda: bind_whole_rows(data, scale, wanted)},
    )


def bind_whole_rows(data: Tensor, scale: Tensor, wanted: Tensor) -> Call:
    """Codes and scales of a row beside each other: one random read of 264 bytes."""
    turns = itertools.cycle(wanted)
    whole = torch.empty(len(data), ROW_BYTES, dtype=torch.uint8, device=data.device)
    whole[:, :256], whole[:, 256:] = data, scale
    words = whole.view(torch.int64)

    def call() -> tuple[Tensor, ...]:
        read = words.index_select(0, next(turns)).view(torch.float8_e4m3fn)
        return read[:, :256], read[:, 256:]

    return call


def cases() -> Iterator[Case]:
    """The widths of the released model's kind: four streams of 4096 channels."""
    for step in ("forward", "backward"):
        build = functools.partial(gate_work, step, 8192, 4, 4096)
        yield Case(OPERATOR, f"gate {step} t=8192 n=4 d=4096", build)
    for step in ("forward", "backward"):
        build = functools.partial(conv_work, step, 8192, 4, 4096)
        yield Case(OPERATOR, f"conv {step} t=8192 n=4 d=4096", build)
    yield Case(OPERATOR, "row step t=8192", functools.partial(row_step_work, 8192))
    for t in (64, 8192):
        build = functools.partial(gather_work, t)
        yield Case(OPERATOR, f"gather fp8 t={t} of {TABLE_BYTES // 10**9} GB", build)

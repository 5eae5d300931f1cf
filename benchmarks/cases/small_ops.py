"""Norm, rotation and activation beside the bandwidth of a copy, PyTorch and its compiler.

Backward cases time the gradient alone. Bytes are those of the rows that are read and written; a
norm's weight and the angles, which many rows share, are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.activation import swiglu
from model1.ops.norm import add_rms_norm, rms_norm
from model1.ops.rope import norm_rotate_tail, rope_frequencies, rotate_tail, rotation

OPERATOR = "small_ops"
TESTS = (
    "tests/ops/test_norm_kernel.py",
    "tests/ops/test_rope_kernel.py",
    "tests/ops/test_swiglu_kernel.py",
)
EPS, LIMIT = 1e-6, 10.0
HEAD_DIM, ROPE_DIM = 512, 64
Step = Literal["forward", "backward"]


class Subject(NamedTuple):
    """run(backend, *tensors) and how many numbers its two steps read and write."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: list[Tensor]
    forward_numbers: int
    backward_numbers: int


def _rows(t: int, c: int, device: torch.device) -> Tensor:
    return normal(t, c, dtype=torch.bfloat16, device=device)


def norm(t: int, c: int, device: torch.device) -> Subject:
    """x to its norm; backward x and one gradient to another."""
    tensors = [_rows(t, c, device), torch.rand(c, device=device)]

    def run(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS, backend=backend)

    return Subject(run, tensors, 2 * t * c, 3 * t * c)


def add_norm(t: int, c: int, device: torch.device) -> Subject:
    """Two rows to two; backward the sum and two gradients to one."""
    tensors = [_rows(t, c, device), _rows(t, c, device), torch.rand(c, device=device)]

    def run(backend: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(x, residual, weight, EPS, backend=backend)

    return Subject(run, tensors, 4 * t * c, 4 * t * c)


def activation(t: int, m: int, device: torch.device) -> Subject:
    """Gate and up side by side."""

    def run(backend: str, both: Tensor) -> Tensor:
        return swiglu(both, None, LIMIT, backend=backend)

    return Subject(run, [_rows(t, 2 * m, device)], 3 * t * m, 5 * t * m)


def turned(t: int, h: int, device: torch.device, *, has_norm: bool) -> Subject:
    """Heads as queries have them; a rotation alone is turned back without them."""
    angles = rotation(
        torch.arange(t, device=device), rope_frequencies(ROPE_DIM, 10000.0).to(device)
    )
    x = _rows(t, h * HEAD_DIM, device).view(t, h, HEAD_DIM)

    def run(backend: str, x: Tensor) -> Tensor:
        if has_norm:
            return norm_rotate_tail(x, angles, norm_eps=EPS, backend=backend)
        return rotate_tail(x, angles, backend=backend)

    return Subject(run, [x], 2 * x.numel(), (3 if has_norm else 2) * x.numel())


def small_work(make: Callable[[torch.device], Subject], step: Step, device: torch.device) -> Work:
    """Ours beside PyTorch's own steps, one by one and compiled."""
    torch.manual_seed(1)
    subject = make(device)
    leaves = [x.requires_grad_(step == "backward") for x in subject.tensors]

    def bind(run: Callable[..., Tensor | tuple[Tensor, ...]]) -> Call:
        def forward() -> tuple[Tensor, ...]:
            returned = run(*leaves)
            return (returned,) if isinstance(returned, Tensor) else returned

        if step == "forward":
            return forward
        outs = forward()
        torch.manual_seed(2)
        grads = [torch.randn_like(x.detach()) for x in outs]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    plain = functools.partial(subject.run, "ref")
    rivals = {
        "pytorch": lambda: bind(plain),
        "inductor": lambda: bind(_compiled(plain)),
    }
    numbers = subject.forward_numbers if step == "forward" else subject.backward_numbers
    return own_work(bind(functools.partial(subject.run, "triton")), 0.0, 2 * numbers, rivals)


def _compiled(run: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Compiled for this case alone: PyTorch counts those of all cases as one function's."""
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, dynamic=False)


def cases() -> Iterator[Case]:
    """A training step or prefill of two models' widths."""
    makes: dict[str, Callable[[torch.device], Subject]] = {}
    for t, c in ((8192, 4096), (8192, 7168)):
        makes[f"rms_norm t={t} c={c}"] = functools.partial(norm, t, c)
        makes[f"add_rms_norm t={t} c={c}"] = functools.partial(add_norm, t, c)
    makes["rms_norm t=8192 c=512"] = functools.partial(norm, 8192, 512)
    for t, m in ((8192, 11008), (8192, 1408)):
        makes[f"swiglu t={t} m={m}"] = functools.partial(activation, t, m)
    for has_norm in (True, False):
        name = "norm_rotate_tail" if has_norm else "rotate_tail"
        makes[f"{name} t=8192 h=64"] = functools.partial(turned, 8192, 64, has_norm=has_norm)
    for name, make in makes.items():
        for step in ("forward", "backward"):
            yield Case(OPERATOR, f"{name} {step}", functools.partial(small_work, make, step))

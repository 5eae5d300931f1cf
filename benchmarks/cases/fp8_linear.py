"""FP8 linear maps with block scales beside bf16 ones, and quantisation beside a copy."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.fp8_linear import fp8_linear, quantize_weight

OPERATOR = "fp8_linear"
TESTS = ("tests/ops/test_fp8_linear*.py",)


def _inputs(t: int, c: int, o: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, w, dy = (
        normal(*shape, dtype=torch.bfloat16, device=device) for shape in ((t, c), (o, c), (t, o))
    )
    return x, w * c**-0.5, dy


def forward_work(t: int, c: int, o: int, device: torch.device) -> Work:
    """x is quantised within the call, the weight before it."""
    x, w, _ = _inputs(t, c, o, device)
    quantized = quantize_weight(w)

    def call(backend: str) -> Call:
        return lambda: (fp8_linear(x, None, quantized=quantized, backend=backend),)

    rivals = {"bf16": lambda: lambda: (F.linear(x, w),), "triton": lambda: call("triton")}
    return own_work(call("auto"), 2.0 * t * c * o, t * (2 * c + 2 * o) + c * o, rivals)


def training_work(t: int, c: int, o: int, device: torch.device) -> Work:
    """Forward and both gradients; the weight, too, is quantised within the call."""
    x, w, dy = _inputs(t, c, o, device)
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def call(precision: str, backend: str) -> Call:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                y = fp8_linear(x, w, precision=precision, backend=backend)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        return run

    rivals = {
        "bf16": lambda: call("bf16", "auto"),
        "triton": lambda: call("fp8", "triton"),
    }
    num_bytes = 4 * t * (2 * c + 2 * o)
    return own_work(call("fp8", "auto"), 6.0 * t * c * o, num_bytes, rivals)


def quantize_work(
    kind: str, power_of_two: bool, t: int, c: int, device: torch.device
) -> Work:  # fmt: skip
    """Reads bf16 and writes the codes once, or with those of the transpose."""
    x = normal(t, c, dtype=torch.bfloat16, device=device)

    def call() -> tuple[Tensor, ...]:
        codes = torch.ops.model1.fp8_quantize(x, kind, power_of_two, "triton")
        return tuple(code.view(torch.uint8) for code in codes)

    num_codes = 1 if kind == "rows" else 2
    return own_work(call, 0.0, t * c * (2 + num_codes) * (1 + 4 / 3 / 128))


def cases() -> Iterator[Case]:
    """A training step's sizes, and a few tokens."""
    for t, c, o in ((8192, 4096, 4096), (8192, 4096, 12288), (16, 4096, 4096)):
        yield Case(OPERATOR, f"forward {t}x{c}x{o}", functools.partial(forward_work, t, c, o))
    for t, c, o in ((8192, 4096, 4096), (8192, 4096, 12288)):
        name = f"forward+backward {t}x{c}x{o}"
        yield Case(OPERATOR, name, functools.partial(training_work, t, c, o))
    for kind, power_of_two in (("rows", True), ("both", True), ("blocks", True), ("both", False)):
        name = f"quantize {kind} {'ue8m0' if power_of_two else 'fp32'} 16384x7168"
        build = functools.partial(quantize_work, kind, power_of_two, 16384, 7168)
        yield Case(OPERATOR, name, build)

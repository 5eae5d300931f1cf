"""SwiGLU in Triton: the formula and its gradients in fp64, clamps, strides, PyTorch's view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from engram_cases import DEVICE, far
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.activation import swiglu
from model1.ops.activation.ref import swiglu_backward_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SHAPES = [(3, 64), (1, 1), (5, 100), (2, 3, 48), (2, 2064), (7,)]
if torch.cuda.is_available():
    SHAPES += [(301, 11008), (4097, 1408), (8192, 2752)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = (1.0, None, 10.0)


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def results(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients of a call on these inputs, which keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, grad.to(out)))]


def calls(limit: float | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernel and the reference, on gate and up or on both in one."""

    def run(*x: Tensor, backend: str) -> Tensor:
        return swiglu(x[0], x[1] if len(x) > 1 else None, limit, backend=backend)

    return lambda *x: run(*x, backend="triton"), lambda *x: run(*x, backend="ref")


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES) * len(DTYPES)))
def test_equals_the_formula_in_float64(number: int, joint: bool) -> None:
    shape, dtype = SHAPES[number % len(SHAPES)], DTYPES[number // len(SHAPES)]
    both = (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(DEVICE, dtype)
    inputs = [both] if joint else list(both.chunk(2, dim=-1))
    grad = torch.randn(shape).to(DEVICE, dtype)
    kernel, plain = calls(LIMITS[number % len(LIMITS)])
    got, baseline = results(kernel, inputs, grad), results(plain, inputs, grad)
    expected = results(plain, [x.double() for x in inputs], grad)
    for x, base, y in zip(got, baseline, expected, strict=True):
        assert x.dtype == dtype
        assert x.shape == y.shape
        assert_close_rows(x, base, y)


def test_backward_reference_is_the_gradient_of_the_reference() -> None:
    gate, up, grad = (3 * torch.randn(40) for _ in range(3))
    gate[:3], up[:4] = torch.tensor([2.0, math.nan, 5.0]), torch.tensor([2.0, -2.0, math.nan, 3.0])
    for limit in (2.0, None):
        _, want_gate, want_up = results(lambda *x, limit=limit: swiglu(*x, limit), [gate, up], grad)
        got_gate, got_up = swiglu_backward_ref(grad, gate, up, limit)
        torch.testing.assert_close(got_gate, want_gate, equal_nan=True)
        torch.testing.assert_close(got_up, want_up, equal_nan=True)


def test_clamps_stop_the_gradient_where_pytorchs_do() -> None:
    special = [2.0, -2.0, 2.0001, -2.0001, 0.0, math.nan, math.inf, -math.inf, 1.0, 150.0, -150.0]
    gate = torch.tensor(special).repeat_interleave(len(special)).to(DEVICE)
    up = torch.tensor(special).repeat(len(special)).to(DEVICE)
    for limit in (2.0, None):
        kernel, plain = calls(limit)
        got, want = (results(run, [gate, up], torch.ones_like(up)) for run in (kernel, plain))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)
            assert torch.equal(x == 0, y == 0) or limit is None


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    gate, up = torch.randn(2, 9, 96).to(DEVICE, torch.bfloat16)
    got = swiglu(gate, up, 1.0, backend="triton")
    wide = swiglu(gate.float(), up.float(), 1.0, backend="triton")
    assert torch.equal(got, wide.bfloat16())


def test_rows_do_not_depend_on_each_other() -> None:
    inputs, order = list(torch.randn(2, 5, 72).to(DEVICE)), torch.tensor([3, 0, 4, 2, 1]).to(DEVICE)
    grad = torch.randn(5, 72).to(DEVICE)
    kernel, _ = calls(1.0)
    want = results(kernel, inputs, grad)
    for rows in (order, slice(3, 4)):
        for got, everything in zip(
            results(kernel, [x[rows] for x in inputs], grad[rows]), want, strict=True
        ):
            assert torch.equal(got, everything[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_gives_nothing(shape: tuple[int, ...], backend: str) -> None:
    both = torch.empty(*shape[:-1], 2 * shape[-1]).to(DEVICE)
    for inputs in ([both], list(both.chunk(2, dim=-1))):
        run = calls(1.0)[0 if backend == "triton" else 1]
        out, *grads = results(run, inputs, torch.ones(shape).to(DEVICE))
        assert out.shape == shape
        assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_strides_and_places_beyond_32_bits() -> None:
    gate, up, grad = torch.randn(3, 3, 40).to(DEVICE, torch.bfloat16)
    kernel, _ = calls(1.0)
    want = results(kernel, [gate, up], grad)
    for lay_apart in (  # 4 GB each: one at a time
        lambda: [gate.T.contiguous().T, up],
        lambda: [far(gate, (2**30 + 16, 1)), up],
        lambda: [gate, far(up, (2**30 + 16, 1))],
    ):
        for x, y in zip(results(kernel, lay_apart(), grad), want, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(
        results(kernel, [gate, up], torch.ones(1, 1).to(grad).expand(3, 40)),
        results(kernel, [gate, up], torch.ones_like(grad)),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    both = torch.randn(3, 32).to(DEVICE)

    def step(x: Tensor) -> Tensor:
        return swiglu(2 * x, None, 1.0, backend=backend).square().sum()

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = both.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_bad_arguments_name_value_and_rule() -> None:
    gate = torch.zeros(2, 6, device=DEVICE)
    for message, arguments in (
        (r"up must be \[2, 6\] .* like gate, got \[2, 3\]", (gate, gate[:, :3], None)),
        (r"up must be .* got \[2, 6\] torch\.float16", (gate, gate.half(), None)),
        (r"gate without up must be \[\.\.\., 2m\], got \[2, 5\]", (gate[:, :5], None, None)),
        (r"limit must be positive or None, got 0", (gate, gate, 0.0)),
        (r"gate must be bfloat16, .* got torch\.float64", (gate.double(), gate.double(), None)),
        (r"gate must be \[\.\.\., m\] floating point, got .*int64", (gate.long(), None, None)),
        (f"up must be on gate's device {gate.device}, got meta", (gate, gate.to("meta"), None)),
    ):
        with pytest.raises(ValueError, match=message):
            swiglu(*arguments, backend="triton")
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        swiglu(gate, None, None, backend="cuda")

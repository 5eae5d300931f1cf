"""RMS normalisation in Triton, with and without a residual: fp64, gradients, strides, PyTorch."""

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
from model1.ops.norm import add_rms_norm, rms_norm
from model1.ops.norm.ref import rms_norm_backward_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.norm.portable import Config
from model1.ops.norm.portable_backward import rms_norm_backward_triton

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SHAPES = [(3, 64), (1, 1), (9, 100), (2, 3, 48), (2, 4096), (7,)]
if torch.cuda.is_available():
    SHAPES += [(301, 7168), (4097, 512), (2049, 3, 128), (65, 16384)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield


def call(
    backend: str, *, has_residual: bool, has_weight: bool
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator on x [, residual] [, weight] as a function of tensors alone."""

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        weight = others[-1] if has_weight else None
        if has_residual:
            return add_rms_norm(x, others[0], weight, EPS, backend=backend)
        return (rms_norm(x, weight, EPS, backend=backend),)

    return run


def results(
    run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """Results and gradients of a call on these inputs, which keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = run(*leaves)
    grads = [grad.to(x) for grad, x in zip(grads, outs, strict=False)]
    return [x.detach() for x in (*outs, *torch.autograd.grad(outs, leaves, grads))]


def inputs_of(
    shape: tuple[int, ...], dtype: torch.dtype, *, has_residual: bool, has_weight: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """x [, residual] [, weight in fp32], and gradients of both results."""
    tensors = [torch.randn(shape).to(DEVICE, dtype) for _ in range(1 + has_residual)]
    if has_weight:
        tensors.append((1 + 0.3 * torch.randn(shape[-1])).to(DEVICE))
    return tensors, [torch.randn(shape).to(DEVICE, dtype) for _ in range(2)]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES) * len(DTYPES)))
def test_equals_the_formula_in_float64(number: int, has_residual: bool) -> None:
    shape, dtype = SHAPES[number % len(SHAPES)], DTYPES[number // len(SHAPES)]
    options = {"has_residual": has_residual, "has_weight": number % 4 != 3}
    inputs, grads = inputs_of(shape, dtype, **options)
    got = results(call("triton", **options), inputs, grads)
    baseline = results(call("ref", **options), inputs, grads)
    expected = results(call("ref", **options), [x.double() for x in inputs], grads)
    for i, (x, base, y) in enumerate(zip(got, baseline, expected, strict=True)):
        is_weight = options["has_weight"] and i == len(got) - 1
        assert x.dtype == (torch.float32 if is_weight else dtype)
        if is_weight and dtype == torch.float32:
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
        else:  # 16-bit operands, and of the weight's gradient sums of them
            assert_close_rows(x, base, y, eps=1e-5 if dtype == torch.float32 else 2e-3)


def test_backward_reference_is_the_gradient_of_the_reference() -> None:
    options = {"has_residual": True, "has_weight": True}
    (x, residual, weight), grads = inputs_of((2, 5, 24), torch.float32, **options)
    want = results(call("ref", **options), [x, residual, weight], grads)
    d_x, d_weight = rms_norm_backward_ref(grads[0], grads[1], x + residual, weight, EPS)
    torch.testing.assert_close(d_x, want[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_weight, want[4], rtol=1e-4, atol=1e-5)


def test_the_sum_is_that_of_two_steps_and_rounded_before_its_norm() -> None:
    x, residual = torch.randn(2, 9, 64).to(DEVICE, torch.bfloat16)
    out, total = add_rms_norm(x, residual, None, EPS, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, None, EPS, backend="triton"))
    wide = rms_norm(total.float(), None, EPS, backend="triton")
    assert torch.equal(out, wide.bfloat16())


def test_a_gradient_of_one_result_alone() -> None:
    inputs, grads = inputs_of((3, 40), torch.float32, has_residual=True, has_weight=True)
    for idx in (0, 1):
        leaves = [[x.detach().requires_grad_() for x in inputs] for _ in range(2)]
        for (x, residual, weight), backend in zip(leaves, ("triton", "ref"), strict=True):
            add_rms_norm(x, residual, weight, EPS, backend=backend)[idx].backward(grads[idx])
        for got, want in zip(*leaves, strict=True):
            expected = torch.zeros_like(got) if want.grad is None else want.grad
            torch.testing.assert_close(got.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_weights_gradient_is_the_sum_over_all_parts() -> None:
    (x, weight), (grad, _) = inputs_of((21, 24), torch.float32, has_residual=False, has_weight=True)
    want = rms_norm_backward_ref(grad, None, x, weight, EPS)
    for num_parts, min_rows in ((512, 1), (4, 1), (512, 4), (1, 1)):
        for elements in (32, 2048):
            config = Config(num_parts=num_parts, min_rows=min_rows, elements=elements)
            got = rms_norm_backward_triton(grad, None, x, weight, EPS, config)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    options = {"has_residual": True, "has_weight": True}
    inputs, grads = inputs_of((5, 72), torch.float32, **options)
    run, order = call("triton", **options), torch.tensor([3, 0, 4, 2, 1]).to(DEVICE)
    want = results(run, inputs, grads)
    for rows in (order, slice(3, 4)):
        some = [*(x[rows] for x in inputs[:2]), inputs[2]]
        got = results(run, some, [x[rows] for x in grads])
        for x, y in zip(got[:4], want[:4], strict=True):
            assert torch.equal(x, y[rows])
    assert torch.equal(results(run, inputs, grads)[4], want[4])
    inputs[0][3, 7] = math.nan
    inputs[0][1, 2] = math.inf
    out, _, d_x, *_ = results(run, inputs, grads)
    for got in (out, d_x):
        assert got[3].isnan().all()
        for row in (0, 2, 4):
            assert got[row].isfinite().all()
    assert out[1, 2].isnan()
    assert (out[1, torch.arange(72) != 2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 4)])
def test_no_rows_give_no_rows_and_no_gradient(shape: tuple[int, ...], backend: str) -> None:
    options = {"has_residual": True, "has_weight": True}
    inputs, grads = inputs_of(shape, torch.float32, **options)
    out, total, d_x, d_residual, d_weight = results(call(backend, **options), inputs, grads)
    assert out.shape == total.shape == d_x.shape == d_residual.shape == shape
    assert torch.equal(d_weight, torch.zeros_like(d_weight))


def test_strides_and_rows_beyond_32_bits() -> None:
    options = {"has_residual": True, "has_weight": True}
    (x, residual, weight), grads = inputs_of((3, 40), torch.bfloat16, **options)
    run = call("triton", **options)
    want = results(run, [x, residual, weight], grads)
    stride = 2**30 + 16
    for lay_apart in (  # 4 GB each: one at a time
        lambda: [x.T.contiguous().T, residual, weight.repeat_interleave(2)[::2]],
        lambda: [far(x, (stride, 1)), residual, weight],
        lambda: [x, far(residual, (stride, 1)), weight],
    ):
        for got, expected in zip(results(run, lay_apart(), grads), want, strict=True):
            assert torch.equal(got, expected)
    streams = torch.stack([x, residual], dim=1)
    assert torch.equal(
        rms_norm(streams[:, 1], weight, EPS, backend="triton"),
        rms_norm(residual, weight, EPS, backend="triton"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    inputs, _ = inputs_of((3, 16), torch.float32, has_residual=True, has_weight=True)

    def step(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        out, total = add_rms_norm(2 * x, residual, weight, EPS, backend=backend)
        return rms_norm(out, None, EPS, backend=backend).square().sum() + total.sum()

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        run(*leaves).backward()
        grads.append([x.grad for x in leaves])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_bad_arguments_name_value_and_rule() -> None:
    x, weight = torch.zeros(2, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    wide = torch.zeros(1, 20000, device=DEVICE)
    for message, arguments in (
        (r"weight must be \[6\] floating point, got \[5\]", (x, x, weight[:5])),
        (r"weight must be \[6\] floating point, got \[6\] .*int64", (x, x, weight.long())),
        (r"residual must be \[2, 6\] .* like x, got \[1, 6\]", (x, x[:1], weight)),
        (r"residual must be .* got \[2, 6\] torch\.float16", (x, x.half(), weight)),
        (f"residual must be on x's device {x.device}, got meta", (x, x.to("meta"), weight)),
        (r"x must be \[\.\.\., c\] floating point, got \[2, 0\]", (x[:, :0], x[:, :0], None)),
        (r"x must be bfloat16, .* got torch\.float64", (x.double(), x.double(), weight)),
        ("at most 16384 channels for triton, got 20000", (wide, wide, None)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            add_rms_norm(*arguments, EPS, backend="triton")
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        rms_norm(x, weight, EPS, backend="cuda")

"""Hyper-connection kernels: the formula in fp64 with its gradients, hostile inputs, invariances."""

from __future__ import annotations

import functools
import math
from typing import Any

import mhc_cases
import pytest
import torch
from mhc_cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    GPU_SHAPES,
    MARKS,
    OPTIONS,
    assert_follow_the_formula,
    assert_same_bits_in_one_graph,
    far_apart,
    run_with_gradients,
)
from oracles import double_precision
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.mhc import MhcCoefficients, mhc_coefficients, mhc_collapse, mhc_write_back
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = MARKS
NAMES = ("x", "phi", "scale", "bias", "y")
SHAPES = [  # t, n, c, dtype
    (1, 4, 64, BF16),
    (3, 4, 192, BF16),
    (2, 4, 64, FP32),
    (3, 2, 64, FP16),
    (1, 8, 64, BF16),
    (2, 3, 40, FP32),
]


make_inputs = functools.partial(mhc_cases.make_inputs, names=NAMES)


def sublayer(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Coefficients, collapsed streams and the streams after a write-back of y."""
    x, phi, scale, bias, y = (inputs[name] for name in NAMES)
    weights = mhc_coefficients(x, phi, scale, bias, **OPTIONS, backend=backend)
    collapsed = mhc_collapse(x, weights.pre, backend=backend)
    return [*weights, collapsed, mhc_write_back(x, y, weights.post, weights.comb, backend=backend)]


def with_gradients(inputs: dict[str, Tensor], backend: str, dtype: Any = None) -> list[Tensor]:
    """Results and gradients of the inputs, all computed in `dtype` if it is given."""
    return run_with_gradients(sublayer, inputs, backend, dtype)


def in_float64(inputs: dict[str, Tensor]) -> list[Tensor]:
    with double_precision():
        return with_gradients(inputs, "ref", torch.float64)


def assert_follows_the_formula(shape: tuple[int, int, int, torch.dtype]) -> None:
    torch.manual_seed(1)
    inputs = make_inputs(*shape)
    dtype = shape[3]
    got, expected = with_gradients(inputs, "triton"), in_float64(inputs)
    baseline = with_gradients(inputs, "ref", dtype)
    names = ("pre", "post", "comb", "collapsed", "written", *(f"d_{name}" for name in NAMES))
    assert_follow_the_formula(
        dict(zip(names, zip(got, baseline, expected, strict=True), strict=True)), dtype,
        of_streams=("collapsed", "written", "d_x", "d_y"), exact=("pre", "post", "comb"),
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs larger shapes")
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_follow_the_formula(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_results_and_gradients_follow_the_formula_on_a_gpu(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


def test_numbers_beyond_32_bits() -> None:
    inputs = make_inputs(2, 3, 32, BF16)
    far = far_apart(inputs["x"])
    got = with_gradients(inputs | {"x": far}, "triton")
    assert all(map(torch.equal, got, with_gradients(inputs, "triton")))


@pytest.mark.gpu
def test_the_rounds_of_a_model_with_many_tokens() -> None:
    """Twenty rounds, and every way of cutting columns and tokens."""
    for t in (1, 16, 200, 2047, 8192):
        inputs = make_inputs(t, 4, 1024, BF16)
        arguments = [inputs[name] for name in NAMES[:4]]
        options = OPTIONS | {"iters": 20}
        got = mhc_coefficients(*arguments, **options, backend="triton")
        with double_precision():
            want = mhc_coefficients(*(a.double() for a in arguments), **options, backend="ref")
        for x, y in zip(got, want, strict=True):
            assert_close_rows(x, y, y)


def test_without_eps_tokens_that_do_not_exist_spoil_no_gradient() -> None:
    inputs = make_inputs(3, 4, 64)
    tensors = [inputs[name].requires_grad_() for name in NAMES[:4]]
    parts = mhc_coefficients(*tensors, **(OPTIONS | {"eps": 0.0}), backend="triton")
    grads = torch.autograd.grad(sum(part.square().sum() for part in parts), tensors)
    assert all(grad.isfinite().all() for grad in grads)


def test_auto_is_the_reference_for_streams_that_no_kernel_takes() -> None:
    inputs = make_inputs(2, 9, 64)
    assert torch.equal(
        mhc_collapse(inputs["x"], inputs["x"][:, :, 0]),
        mhc_collapse(inputs["x"], inputs["x"][:, :, 0], backend="ref"),
    )
    with pytest.raises(BackendUnavailable, match="at most 8 streams"):
        mhc_collapse(inputs["x"], inputs["x"][:, :, 0], backend="triton")


def test_no_tokens() -> None:
    results = with_gradients(make_inputs(0, 4, 64, BF16), "triton")
    assert [list(x.shape) for x in results[:5]] == [[0, 4], [0, 4], [0, 4, 4], [0, 64], [0, 4, 64]]
    assert all(not x.any() for x in results[5:])


def test_the_order_of_tokens_does_not_matter() -> None:
    inputs, order = make_inputs(5, 4, 64, BF16), torch.randperm(5).to(DEVICE)
    other = inputs | {name: inputs[name][order] for name in ("x", "y")}
    for a, b in zip(sublayer(other, "triton"), sublayer(inputs, "triton"), strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.gpu
def test_repeated_calls_have_the_same_bits() -> None:
    inputs = make_inputs(3000, 4, 1024, BF16)
    first, second = with_gradients(inputs, "triton"), with_gradients(inputs, "triton")
    assert all(map(torch.equal, first, second))


def test_a_nan_stays_in_its_token() -> None:
    inputs = make_inputs(4, 2, 64, BF16)
    want = sublayer(inputs, "triton")
    inputs["x"][1, 1, 3] = math.nan
    got = sublayer(inputs, "triton")
    rest = [0, 2, 3]
    for a, b in zip(got, want, strict=True):
        assert a[1].isnan().all()
        assert torch.equal(a[rest], b[rest])


def test_streams_and_arguments_may_lie_anywhere() -> None:
    inputs = make_inputs(2, 2, 64, BF16)
    far = dict(inputs)
    for name, tensor in inputs.items():
        wide = torch.full((2, *tensor.shape), math.nan, dtype=tensor.dtype, device=DEVICE)
        far[name] = wide.movedim(0, -1)[..., 0].copy_(tensor)
    # channels that are no neighbours, streams apart, and the one stream that a model starts with
    apart = torch.full((2, 5, 72), math.nan, dtype=BF16, device=DEVICE)[:, ::2][:, :2, :64]
    single = inputs["x"][:, :1].expand(-1, 2, -1)
    want = with_gradients(inputs, "triton")
    for strange in (far, inputs | {"x": apart.copy_(inputs["x"])}):
        assert all(map(torch.equal, with_gradients(strange, "triton"), want))
    got = sublayer(inputs | {"x": single}, "triton")
    want = sublayer(inputs | {"x": single.contiguous()}, "triton")
    assert all(map(torch.equal, got, want))


def test_the_operators_describe_themselves_to_pytorch() -> None:
    inputs = make_inputs(1, 1, 64)
    x, phi, scale, bias, y = (inputs[name].requires_grad_() for name in NAMES)
    weights = mhc_coefficients(x, phi, scale, bias, **OPTIONS, backend="ref")
    pre, post, comb = (w.detach().requires_grad_() for w in weights)
    ops = torch.ops.model1
    for backend in ("triton", "ref"):
        for op, arguments in (
            (ops.mhc_coefficients, (x, phi, scale, bias, 1, 1e-6, 1e-6)),
            (ops.mhc_collapse, (x, pre)),
            (ops.mhc_write_back, (x, y, post, comb)),
        ):
            torch.library.opcheck(op.default, (*arguments, backend))


def test_gradients_of_the_reference_operators_are_those_of_autograd() -> None:
    """A plug-in may take them for its own."""
    inputs = make_inputs(3, 3, 8)
    x, phi, scale, bias, y = (inputs[name].requires_grad_() for name in NAMES)
    ops = torch.ops.model1

    def through_operators() -> list[Tensor]:
        weights = ops.mhc_coefficients(x, phi, scale, bias, *OPTIONS.values(), "ref")
        pre, post, comb = weights[:3]
        written = ops.mhc_write_back(x, y, post, comb, "ref")
        return [pre, post, comb, ops.mhc_collapse(x, pre, "ref"), written]

    leaves = [x, phi, scale, bias, y]
    got, want = through_operators(), sublayer(inputs, "ref")
    grads = [torch.randn_like(result) for result in want]
    results = (torch.autograd.grad(out, leaves, grads) for out in (got, want))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_graph_under_torch_compile() -> None:
    assert_same_bits_in_one_graph(sublayer, make_inputs(1, 1, 64))


def test_what_kernels_do_not_take_is_refused() -> None:
    inputs = make_inputs(2, 4, 64)
    x, y, pre = inputs["x"], inputs["y"], torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32, got .*float64"):
        mhc_collapse(x.double(), pre, backend="triton")
    with pytest.raises(BackendUnavailable, match="mhc/triton takes at most 8 streams, got 9"):
        mhc_collapse(torch.ones(2, 9, 64, device=DEVICE), pre[:, [0] * 9], backend="triton")
    with pytest.raises(ValueError, match=r"pre must be \[2, 4\] floating point, got \[2, 3\]"):
        mhc_collapse(x, pre[:, :3], backend="triton")
    with pytest.raises(ValueError, match=r"x must be \[t, n, c\] floating point, got \[2, 64\]"):
        mhc_collapse(y, pre, backend="triton")
    with pytest.raises(ValueError, match=r"y must be \[2, 64\] floating point, got \[2, 63\]"):
        mhc_write_back(x, y[:, 1:], pre, torch.ones(2, 4, 4, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match=r"comb must be \[2, 4, 4\] .*, got \[2, 4, 3\]"):
        mhc_write_back(x, y, pre, torch.ones(2, 4, 3, device=DEVICE), backend="triton")
    arguments = inputs["phi"], inputs["scale"], inputs["bias"].to("meta")
    with pytest.raises(ValueError, match=r"bias must be on x's device .*, got meta"):
        mhc_coefficients(x, *arguments, **OPTIONS, backend="triton")
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        mhc_collapse(x, pre, backend="cuda")


def test_coefficients_are_named() -> None:
    inputs = make_inputs(1, 2, 64)
    got = mhc_coefficients(*(inputs[name] for name in NAMES[:4]), **OPTIONS, backend="triton")
    assert isinstance(got, MhcCoefficients)
    assert got.comb.shape == (1, 2, 2)

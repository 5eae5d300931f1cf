"""Fused hyper-connection kernels: the formula in fp64 with its gradients, and the unfused chain."""

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
from model1.ops.mhc import mhc_coefficients, mhc_collapse, mhc_write_back
from model1.ops.mhc.chain import MhcSeam, mhc_collapse_norm, mhc_enter, mhc_seam
from model1.ops.norm import rms_norm

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = MARKS
NAMES = ("x", "y", "pre", "post", "comb", "phi", "scale", "bias", "weight")
RESULTS = ("first", "written", "u", "post", "comb")
ENTERING = ("x", "phi", "scale", "bias", "weight")
IN_STREAM_DTYPE = ("first", "written", "u", "d_x", "d_y")
SHAPES = [  # t, n, c, dtype
    (1, 4, 64, BF16),
    (33, 4, 192, BF16),
    (3, 1, 64, BF16),
    (129, 3, 64, BF16),
    (3, 2, 320, BF16),
    (2, 4, 64, FP32),
    (3, 2, 64, FP16),
    (2, 2, 1100, BF16),
    (1, 8, 64, BF16),
    (2, 3, 40, FP32),
]


make_inputs = functools.partial(mhc_cases.make_inputs, names=NAMES)


def seam(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """What a sublayer reads, then what the one behind it starts from."""
    x, y, pre, post, comb, phi, scale, bias, weight = (inputs[name] for name in NAMES)
    u, x = mhc_collapse_norm(x, pre, weight, norm_eps=1e-6, backend=backend)
    return [u, *mhc_seam(x, y, post, comb, phi, scale, bias, weight, **OPTIONS, backend=backend)]


def entering(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The streams, and what a sublayer that follows none starts from."""
    tensors = (inputs[name] for name in ENTERING)
    return list(mhc_enter(*tensors, **OPTIONS, backend=backend))


def unfused(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    x, y, pre, post, comb, phi, scale, bias, weight = (inputs[name] for name in NAMES)
    u = rms_norm(mhc_collapse(x, pre, backend=backend), weight, 1e-6)
    out = mhc_write_back(x, y, post, comb, backend=backend)
    pre, post, comb = mhc_coefficients(out, phi, scale, bias, **OPTIONS, backend=backend)
    behind, out = mhc_collapse_norm(out, pre, weight, norm_eps=1e-6, backend=backend)
    return [u, out, behind, post, comb]


def with_gradients(
    inputs: dict[str, Tensor], backend: str, dtype: Any = None, run: Any = seam
) -> list[Tensor]:
    """Results and gradients of the inputs, all computed in `dtype` if it is given."""
    return run_with_gradients(run, inputs, backend, dtype)


def assert_follows_the_formula(shape: tuple[int, int, int, torch.dtype], run: Any = seam) -> None:
    torch.manual_seed(1)
    inputs = make_inputs(*shape)
    if run is entering:
        inputs = {name: inputs[name] for name in ENTERING}
    results, dtype = RESULTS[-len(run(inputs, "ref")) :], shape[3]
    got = with_gradients(inputs, "triton", None, run)
    baseline = with_gradients(inputs, "ref", dtype, run)
    with double_precision():
        expected = with_gradients(inputs, "ref", torch.float64, run)
        # coefficients are of the streams as they are stored
        stored = got[results.index("written")].detach().double()
        parameters = (inputs[name].double() for name in ("phi", "scale", "bias"))
        of_stored = mhc_coefficients(stored, *parameters, **OPTIONS, backend="ref")
    first = results.index("post")
    expected[first : first + 2] = baseline[first : first + 2] = of_stored[1:]
    names = (*results, *(f"d_{name}" for name in inputs))
    few = [f"d_{name}" for name in ("pre", "post", "comb", "scale", "bias", "weight")]
    assert_follow_the_formula(
        dict(zip(names, zip(got, baseline, expected, strict=True), strict=True)), dtype,
        of_streams=IN_STREAM_DTYPE, few=few,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs larger shapes")
@pytest.mark.parametrize("run", [seam, entering])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_follow_the_formula(
    shape: tuple[int, int, int, torch.dtype], run: Any
) -> None:
    assert_follows_the_formula(shape, run)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [seam, entering])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_results_and_gradients_follow_the_formula_on_a_gpu(
    shape: tuple[int, int, int, torch.dtype], run: Any
) -> None:
    assert_follows_the_formula(shape, run)


def test_the_fused_chain_is_the_unfused_one() -> None:
    inputs = make_inputs(19, 4, 192, BF16)
    got, want = seam(inputs, "triton"), unfused(inputs, "triton")
    assert all(map(torch.equal, got[1:], want[1:]))


def test_on_a_cpu_it_is_the_old_chain_to_the_bit() -> None:
    inputs = {name: x.cpu() for name, x in make_inputs(3, 4, 64, BF16).items()}
    assert all(
        map(
            torch.equal, with_gradients(inputs, "ref"), with_gradients(inputs, "ref", None, unfused)
        )
    )
    with torch.no_grad():
        assert all(map(torch.equal, seam(inputs, "auto"), unfused(inputs, "auto")))


def test_either_gradient_of_the_stream_may_be_missing() -> None:
    inputs = make_inputs(3, 4, 64)
    leaves = [inputs[name].requires_grad_() for name in ("x", "pre", "weight")]
    u, passed = mhc_collapse_norm(*leaves, norm_eps=1e-6, backend="triton")
    grad = torch.randn_like(passed)
    (alone,) = torch.autograd.grad(passed, leaves[:1], grad, retain_graph=True)
    assert torch.equal(alone, grad)
    (one,) = torch.autograd.grad(u, leaves[:1], torch.ones_like(u), retain_graph=True)
    (both,) = torch.autograd.grad((u, passed), leaves[:1], (torch.ones_like(u), grad))
    torch.testing.assert_close(both, one + grad)


def test_numbers_beyond_32_bits() -> None:
    inputs = make_inputs(2, 3, 32, BF16)
    far = far_apart(inputs["x"])
    got = with_gradients(inputs | {"x": far}, "triton")
    assert all(map(torch.equal, got, with_gradients(inputs, "triton")))


def test_no_tokens() -> None:
    results = with_gradients(make_inputs(0, 4, 64, BF16), "triton")
    shapes = [[0, 64], [0, 4, 64], [0, 64], [0, 4], [0, 4, 4]]
    assert [list(x.shape) for x in results[:5]] == shapes
    assert all(not x.any() for x in results[5:])


def test_the_order_of_tokens_does_not_matter() -> None:
    inputs, order = make_inputs(21, 4, 64, BF16), torch.randperm(21).to(DEVICE)
    other = inputs | {name: inputs[name][order] for name in NAMES[:5]}
    for a, b in zip(seam(other, "triton"), seam(inputs, "triton"), strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.gpu
def test_repeated_calls_have_the_same_bits() -> None:
    inputs = make_inputs(3000, 4, 1024, BF16)
    first, second = with_gradients(inputs, "triton"), with_gradients(inputs, "triton")
    assert all(map(torch.equal, first, second))


def test_a_nan_stays_in_its_token() -> None:
    inputs = make_inputs(4, 2, 64, BF16)
    want = seam(inputs, "triton")
    inputs["x"][1, 1, 3] = math.nan
    got = seam(inputs, "triton")
    rest = [0, 2, 3]
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert a[1].isnan().all() if name != "written" else a[1].isnan().any()
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
    got = seam(inputs | {"x": single}, "triton")
    want = seam(inputs | {"x": single.contiguous()}, "triton")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_operators_describe_themselves_to_pytorch(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 1, 64, dtype)
    x, y, pre, post, comb, phi, scale, bias, weight = (inputs[k].requires_grad_() for k in NAMES)
    ops = torch.ops.model1
    for backend in ("triton", "ref"):
        for op, arguments in (
            (ops.mhc_collapse_norm, (x, pre, weight, 1e-6)),
            (ops.mhc_enter, (x, phi, scale, bias, weight, 1, 1e-6, 1e-6)),
            (
                ops.mhc_seam,
                (x, y, post, comb, phi, scale, bias, weight, 1, 1e-6, 1e-6),
            ),
        ):
            torch.library.opcheck(op.default, (*arguments, backend))


def test_gradients_of_the_reference_operators_are_those_of_autograd() -> None:
    """A plug-in may take them for its own."""
    inputs = make_inputs(3, 3, 8)
    ops = torch.ops.model1

    def through_operators(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        x, y, pre, post, comb, phi, scale, bias, weight = (inputs[name] for name in NAMES)
        u = ops.mhc_collapse_norm(x, pre, weight, 1e-6, backend)
        parameters = phi, scale, bias, weight, *OPTIONS.values(), backend
        return [u, *ops.mhc_seam(x, y, post, comb, *parameters)[:4]]

    got = with_gradients(inputs, "ref", None, through_operators)
    for a, b in zip(got, with_gradients(inputs, "ref"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_one_graph_under_torch_compile(dtype: torch.dtype) -> None:
    assert_same_bits_in_one_graph(seam, make_inputs(1, 1, 64, dtype))


def test_what_kernels_do_not_take_is_refused() -> None:
    inputs = make_inputs(2, 4, 64)
    x, pre, weight = inputs["x"], inputs["pre"], inputs["weight"]
    options = {"norm_eps": 1e-6, "backend": "triton"}
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32, got .*float64"):
        mhc_collapse_norm(x.double(), pre, weight, **options)
    with pytest.raises(BackendUnavailable, match="mhc/triton takes at most 8 streams, got 9"):
        mhc_collapse_norm(torch.ones(2, 9, 64, device=DEVICE), pre[:, [0] * 9], weight, **options)
    with pytest.raises(ValueError, match=r"weight must be \[64\] floating point, got \[63\]"):
        mhc_collapse_norm(x, pre, weight[1:], **options)
    names = ("x", "y", "post", "comb", "phi", "scale", "bias", "weight")
    arguments = {name: inputs[name] for name in names}
    for name, wrong, message in (
        ("phi", inputs["phi"][1:], r"phi must be \[24, 256\], got \[23, 256\]"),
        ("y", inputs["y"][:, 1:], r"y must be \[2, 64\] floating point, got \[2, 63\]"),
        ("weight", weight[1:], r"weight must be \[64\] floating point, got \[63\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mhc_seam(**arguments | {name: wrong}, **OPTIONS, backend="triton")


def test_the_parts_of_a_seam_are_named() -> None:
    inputs = make_inputs(3, 2, 64)
    got = mhc_seam(
        *(inputs[name] for name in ("x", "y", "post", "comb", "phi", "scale", "bias", "weight")),
        **OPTIONS, backend="triton",
    )  # fmt: skip
    assert isinstance(got, MhcSeam)
    want = unfused(inputs, "triton")[1:]
    assert all(map(torch.equal, (got.x, got.u, got.post, got.comb), want))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_of_what_a_sublayer_starts_from_may_be_missing(dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 4, 64, dtype)
    leaves = [inputs[name].requires_grad_() for name in ENTERING]
    passed, *start = mhc_enter(*leaves, **OPTIONS, backend="triton")
    grads = [torch.randn_like(part) for part in start]
    of_x = torch.randn_like(passed)
    (alone,) = torch.autograd.grad(passed, leaves[:1], of_x, retain_graph=True)
    assert torch.equal(alone, of_x)
    both = torch.autograd.grad([passed, *start], leaves, [of_x, *grads], retain_graph=True)
    one = torch.autograd.grad(start, leaves, grads, retain_graph=True)
    torch.testing.assert_close(both[0], one[0] + of_x, rtol=2e-2, atol=2e-2)
    assert all(map(torch.equal, both[1:], one[1:]))
    zeros = [grads[0], *map(torch.zeros_like, grads[1:])]
    want = torch.autograd.grad(start, leaves, zeros, retain_graph=True)
    got = torch.autograd.grad(start[:1], leaves, grads[:1])
    assert all(map(torch.equal, got, want))

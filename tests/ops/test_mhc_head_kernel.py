"""The exit's weights in kernels: the formula in fp64 with its gradients, invariances, refusals."""

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
    assert_follow_the_formula,
    assert_same_bits_in_one_graph,
    far_apart,
    run_with_gradients,
)
from oracles import double_precision
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.mhc import mhc_head

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = MARKS
NAMES = ("x", "phi", "scale", "bias")
EPS: dict[str, Any] = {"eps": 1e-6, "norm_eps": 1e-6}
SHAPES = [  # t, n, c, dtype
    (1, 4, 64, BF16),
    (67, 4, 192, BF16),
    (2, 4, 64, FP32),
    (3, 2, 64, FP16),
    (5, 8, 64, BF16),
    (2, 3, 40, FP32),
]


def make_inputs(t: int, n: int, c: int, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    """The coefficients' inputs, of which the first columns are `pre`'s."""
    inputs = mhc_cases.make_inputs(t, n, c, dtype, names=NAMES)
    sizes = {"phi": n, "scale": 1, "bias": n}
    return inputs | {name: inputs[name][:size].contiguous() for name, size in sizes.items()}


def head(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    return [mhc_head(*(inputs[name] for name in NAMES), **EPS, backend=backend)]


with_gradients = functools.partial(run_with_gradients, head)


def assert_follows_the_formula(shape: tuple[int, int, int, torch.dtype]) -> None:
    torch.manual_seed(1)
    inputs = make_inputs(*shape)
    dtype = shape[3]
    got, baseline = with_gradients(inputs, "triton"), with_gradients(inputs, "ref", dtype)
    with double_precision():
        expected = with_gradients(inputs, "ref", torch.float64)
    names = ("pre", *(f"d_{name}" for name in NAMES))
    # of the last two so few that the baseline may be right by luck
    noise = dict.fromkeys(("d_scale", "d_bias"), 1e-5 * math.sqrt(shape[0]))
    assert_follow_the_formula(
        dict(zip(names, zip(got, baseline, expected, strict=True), strict=True)), dtype,
        of_streams=("d_x",), exact=("pre",), noise=noise,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs larger shapes")
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_follow_the_formula(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*GPU_SHAPES, (4099, 4, 768, BF16)])
def test_weights_and_gradients_follow_the_formula_on_a_gpu(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


def test_numbers_beyond_32_bits() -> None:
    inputs = make_inputs(2, 3, 32, BF16)
    got = with_gradients(inputs | {"x": far_apart(inputs["x"])}, "triton")
    assert all(map(torch.equal, got, with_gradients(inputs, "triton")))


def test_no_tokens() -> None:
    pre, *grads = with_gradients(make_inputs(0, 4, 64, BF16), "triton")
    assert pre.shape == (0, 4)
    assert all(not x.any() for x in grads)


def test_the_order_of_tokens_does_not_matter() -> None:
    inputs, order = make_inputs(69, 4, 64, BF16), torch.randperm(69).to(DEVICE)
    (got,) = head(inputs | {"x": inputs["x"][order]}, "triton")
    assert torch.equal(got, head(inputs, "triton")[0][order])


def test_repeated_calls_have_the_same_bits() -> None:
    inputs = make_inputs(3000 if DEVICE == "cuda" else 70, 4, 64, BF16)
    first, second = with_gradients(inputs, "triton"), with_gradients(inputs, "triton")
    assert all(map(torch.equal, first, second))


def test_a_nan_stays_in_its_token() -> None:
    inputs = make_inputs(4, 2, 64, BF16)
    (want,) = head(inputs, "triton")
    inputs["x"][1, 1, 3] = math.nan
    (got,) = head(inputs, "triton")
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_without_eps_tokens_that_do_not_exist_spoil_no_gradient() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(3, 4, 64).values()]
    pre = mhc_head(*leaves, eps=0.0, norm_eps=1e-6, backend="triton")
    grads = torch.autograd.grad(pre.square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)


def test_streams_and_arguments_may_lie_anywhere() -> None:
    inputs = make_inputs(2, 2, 64, BF16)
    far = dict(inputs)
    for name, tensor in inputs.items():
        wide = torch.full((2, *tensor.shape), math.nan, dtype=tensor.dtype, device=DEVICE)
        far[name] = wide.movedim(0, -1)[..., 0].copy_(tensor)
    apart = torch.full((2, 5, 72), math.nan, dtype=BF16, device=DEVICE)[:, ::2][:, :2, :64]
    want = with_gradients(inputs, "triton")
    for strange in (far, inputs | {"x": apart.copy_(inputs["x"])}):
        assert all(map(torch.equal, with_gradients(strange, "triton"), want))
    single = inputs["x"][:, :1].expand(-1, 2, -1)
    same = head(inputs | {"x": single}, "triton") + head(
        inputs | {"x": single.contiguous()}, "triton"
    )
    assert torch.equal(*same)


def test_the_operator_describes_itself_to_pytorch() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(3, 4, 64).values()]
    for backend in ("triton", "ref"):
        torch.library.opcheck(torch.ops.model1.mhc_head.default, (*leaves, 1e-6, 1e-6, backend))


def test_gradients_of_the_reference_operator_are_those_of_autograd() -> None:
    """A plug-in may take them for its own."""
    inputs = make_inputs(3, 3, 8)

    def through_operator(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        return [torch.ops.model1.mhc_head(*inputs.values(), 1e-6, 1e-6, backend)[0]]

    got = run_with_gradients(through_operator, inputs, "ref")
    for a, b in zip(got, with_gradients(inputs, "ref"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_graph_under_torch_compile() -> None:
    assert_same_bits_in_one_graph(head, make_inputs(3, 2, 64))


def test_what_kernels_do_not_take_is_refused() -> None:
    x, phi, scale, bias = make_inputs(2, 4, 64).values()
    options = EPS | {"backend": "triton"}
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32, got .*float64"):
        mhc_head(x.double(), phi, scale, bias, **options)
    with pytest.raises(ValueError, match=r"x must be \[t, n, c\], got \[2, 256\]"):
        mhc_head(x.flatten(1), phi, scale, bias, **options)
    with pytest.raises(ValueError, match=r"scale and bias must be \[1\] and \[4\], got \[4\]"):
        mhc_head(x, phi, bias, bias, **options)
    with pytest.raises(ValueError, match=r"bias must be on x's device .*, got meta"):
        mhc_head(x, phi, scale, bias.to("meta"), **options)
    wide = make_inputs(2, 9, 64)
    with pytest.raises(BackendUnavailable, match="mhc/triton takes at most 8 streams, got 9"):
        head(wide, "triton")
    assert torch.equal(*head(wide, "auto"), *head(wide, "ref"))

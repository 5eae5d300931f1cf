"""Engram's short convolution over packed documents: windows, gradients, the kernels."""

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
from model1.ops.engram import engram_causal_conv, engram_short_conv
from model1.ops.engram.ref import engram_causal_conv_backward_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.engram.portable_conv import Config, engram_causal_conv_backward_triton

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SHAPES = [  # documents' lengths, n, d, taps, dilation
    ((9,), 2, 16, 4, 3),
    ((1,), 1, 7, 1, 1),
    ((3, 1, 14), 3, 20, 4, 2),
    ((0, 5, 2), 2, 150, 3, 4),
    ((2, 2), 1, 600, 2, 1),
]
if torch.cuda.is_available():
    SHAPES += [((300, 1, 160), 4, 4096, 4, 3), ((517,), 1, 7168, 4, 4), ((33, 90), 8, 640, 4, 2)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def positions_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)


def inputs_of(
    lengths: tuple[int, ...], n: int, d: int, taps: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    x = torch.randn(sum(lengths), n * d).to(DEVICE, dtype)
    weight = torch.randn(n * d, taps).to(DEVICE)
    return [x, weight, (1 + 0.3 * torch.randn(n, d)).to(DEVICE)]


def results(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients of a call on these inputs, which keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, grad.to(out)))]


def call(positions: Tensor, dilation: int, backend: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        return engram_causal_conv(
            x, positions, weight, norm_weight, dilation=dilation, eps=EPS, backend=backend
        )

    return run


def plain(positions: Tensor, dilation: int) -> Callable[..., Tensor]:
    """What PyTorch does in the dtype of x, with windows in memory."""

    def run(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        y = x.unflatten(1, norm_weight.shape)
        y = y * (y.float().square().mean(-1, keepdim=True) + EPS).rsqrt().to(x)
        y, total = (y * norm_weight.to(x)).flatten(1), torch.zeros_like(x)
        for j in range(weight.shape[1]):
            back = (weight.shape[1] - 1 - j) * dilation
            seen = torch.cat([torch.zeros_like(y[:back]), y])[: len(y)]
            total = total + seen * (positions >= back).to(x)[:, None] * weight[:, j].to(x)
        return torch.nn.functional.silu(total)

    return run


@pytest.mark.parametrize("number", range(len(SHAPES) * len(DTYPES)))
def test_equals_the_formula_in_float64(number: int) -> None:
    (lengths, n, d, taps, dilation), dtype = SHAPES[number % len(SHAPES)], DTYPES[number % 3]
    inputs, positions = inputs_of(lengths, n, d, taps, dtype), positions_of(lengths)
    grad = torch.randn(inputs[0].shape).to(inputs[0])
    got = results(call(positions, dilation, "triton"), inputs, grad)
    baseline = results(plain(positions, dilation), inputs, grad)
    expected = results(call(positions, dilation, "ref"), [x.double() for x in inputs], grad)
    for i, (x, base, y) in enumerate(zip(got, baseline, expected, strict=True)):
        assert x.dtype == (dtype if i < 2 else torch.float32)
        if dtype == torch.float32:
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
        else:  # a weight's gradient is judged as one row: tokens are few here
            shape = x.shape if i < 2 else (1, -1)
            assert_close_rows(x.reshape(shape), base.reshape(shape), y.reshape(shape), eps=2e-3)


def test_documents_are_convolved_as_if_each_were_alone() -> None:
    lengths, taps, dilation = (5, 1, 12, 0, 7), 4, 2
    (x, weight, norm_weight), positions = inputs_of(lengths, 2, 8, taps), positions_of(lengths)
    whole = call(positions, dilation, "triton")(x, weight, norm_weight)
    for part, place in zip(x.split(lengths), positions.split(lengths), strict=True):
        back = [dilation * (taps - 1 - j) for j in range(taps)]
        zeros = torch.zeros_like
        window = torch.stack([torch.cat([zeros(part[:n]), part])[: len(part)] for n in back], 1)
        alone = call(place, dilation, "triton")(part, weight, norm_weight)
        want = engram_short_conv(window, weight, norm_weight, eps=EPS)
        torch.testing.assert_close(alone, want, rtol=1e-5, atol=1e-5)
    parts = [
        call(place, dilation, "triton")(part, weight, norm_weight)
        for part, place in zip(x.split(lengths), positions.split(lengths), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_backward_reference_is_the_gradient_of_the_reference() -> None:
    for lengths, n, d, taps, dilation in SHAPES[:4]:
        inputs, positions = inputs_of(lengths, n, d, taps), positions_of(lengths)
        grad = torch.randn(inputs[0].shape).to(DEVICE)
        want = results(call(positions, dilation, "ref"), inputs, grad)[1:]
        x, *weights = inputs
        got = engram_causal_conv_backward_ref(grad, x, positions, *weights, dilation, EPS)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_weights_gradient_is_the_sum_over_all_parts() -> None:
    lengths = (11, 20)
    (x, *weights), positions = inputs_of(lengths, 2, 24, 3), positions_of(lengths)
    grad = torch.randn(x.shape).to(DEVICE)
    want = engram_causal_conv_backward_ref(grad, x, positions, *weights, 2, EPS)
    for tokens, tokens_per_sum in ((4, 4), (4, 16), (16, 64)):
        config = Config(
            sum_tokens=tokens, tokens_per_sum=tokens_per_sum, channels=16, row_channels=16
        )
        got = engram_causal_conv_backward_triton(grad, x, positions, *weights, 2, EPS, config)
        again = engram_causal_conv_backward_triton(grad, x, positions, *weights, 2, EPS, config)
        for a, b, c in zip(got, want, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert torch.equal(a, c)


def test_nan_reaches_the_tokens_that_see_it_alone() -> None:
    lengths = (8, 6)
    (x, *weights), positions = inputs_of(lengths, 2, 8, 3), positions_of(lengths)
    want = call(positions, 2, "triton")(x, *weights)
    x[5, 3] = math.nan  # seen by rows 5 and 7; row 9 is of the next document
    got = call(positions, 2, "triton")(x, *weights)
    wrong = torch.zeros(14, 16, dtype=torch.bool, device=DEVICE)
    wrong[[5, 7], :8] = True
    assert torch.equal(got.isnan(), wrong)
    assert torch.equal(got[~wrong], want[~wrong])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_nothing(backend: str) -> None:
    shapes = (0, 16), (16, 3), (2, 8)
    inputs = [torch.ones(shape).to(DEVICE) for shape in shapes]
    positions = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out, d_x, *d_weights = results(call(positions, 2, backend), inputs, inputs[0])
    assert out.shape == d_x.shape == (0, 16)
    assert all((x == 0).all() for x in d_weights)


def test_strides_and_places_beyond_32_bits() -> None:
    (x, *weights), positions = inputs_of((3,), 2, 8, 2, torch.bfloat16), positions_of((3,))
    grad, run = torch.randn(3, 16).to(x), call(positions, 1, "triton")
    want = results(run, [x, *weights], grad)
    strided = [weights[0].T.contiguous().T, weights[1].repeat(1, 2)[:, :8]]
    for apart in ([far(x, (2**30 + 16, 1)), *weights], [x.T.contiguous().T, *strided]):
        for got, expected in zip(results(run, apart, grad), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    inputs, positions = inputs_of((4, 3), 2, 8, 3), positions_of((4, 3))
    run = call(positions, 2, backend)

    def step(x: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
        return run(2 * x, weight, norm_weight).square().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves).backward()
        grads.append([x.grad for x in leaves])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_the_operators_describe_themselves_to_pytorch() -> None:
    (x, *weights), positions = inputs_of((3, 2), 2, 8, 3), positions_of((3, 2))
    operators = torch.ops.model1
    arguments = (x, positions, *weights, 2, EPS, "triton")
    torch.library.opcheck(operators.engram_causal_conv.default, arguments)
    torch.library.opcheck(operators.engram_causal_conv_backward.default, (x, *arguments))


def test_bad_arguments_name_value_and_rule() -> None:
    (x, weight, norm_weight), positions = inputs_of((4,), 2, 8, 3), positions_of((4,))
    good = {"x": x, "positions": positions, "weight": weight, "norm_weight": norm_weight}
    good |= {"dilation": 2, "eps": EPS, "backend": "triton"}
    for message, change in (
        (r"x must be \[t, n\*d\] floating point, got \(4, 2, 8\)", {"x": x.view(4, 2, 8)}),
        (r"x must be bfloat16, .* for triton, got torch\.float64", {"x": x.double()}),
        (r"positions must be int64 with 1 axes, got torch\.int32", {"positions": positions.int()}),
        (r"positions must have shape \(4,\), got \(3,\)", {"positions": positions[:3]}),
        (r"weight must be \[16, K > 0\], got shape \(15, 3\)", {"weight": weight[:15]}),
        (r"norm_weight must be \[n, d\] with n\*d = 16, got", {"norm_weight": norm_weight[:1]}),
        ("eps must be positive, got 0", {"eps": 0.0}),
        ("dilation must be at least 1, got 0", {"dilation": 0}),
        (f"weight must be on {x.device}, got meta", {"weight": weight.to("meta")}),
    ):
        with pytest.raises(ValueError, match=message):
            engram_causal_conv(**(good | change))
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        engram_causal_conv(**(good | {"backend": "cuda"}))

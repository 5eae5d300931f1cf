"""Engram's gate in Triton: the formula and its gradients in fp64, PyTorch's view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from engram_cases import DEVICE, far
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.engram import engram_gate
from model1.ops.engram.ref import engram_gate_backward_ref, engram_gate_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.engram.portable import Config, engram_gate_backward_triton

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SHAPES = [  # t, n, d
    (1, 1, 16),
    (3, 4, 64),
    (5, 3, 100),
    (2, 8, 48),
    (2, 2, 2064),
    (2, 5, 7),
]
if torch.cuda.is_available():
    SHAPES += [(301, 4, 4096), (130, 1, 7168), (65, 8, 2560), (4001, 2, 16)]
VARIANTS = [  # dtype, signed_sqrt
    (torch.float32, True),
    (torch.bfloat16, True),
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.float16, True),
]


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def gate_inputs(t: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, key, value and norm_weight; key and value lie in one projection, as in the model.

    Scores are about 3 or -3: near 0 the root would magnify whatever fp32 is off by.
    """
    h, joint = torch.randn(t, n, d), torch.randn(t, n + 1, d)
    joint[:, :-1] += 3 / d**0.5 * h * (2 * torch.randint(2, (t, n, 1)) - 1)
    h, joint = h.to(DEVICE, dtype), joint.to(DEVICE, dtype)
    weight = 1 + 0.3 * torch.randn(n, d)
    return [h, joint[:, :-1], joint[:, -1], weight.to(DEVICE)]


def plain_gate(
    h: Tensor, key: Tensor, value: Tensor, weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    """What PyTorch does without kernels, products in the dtype of h."""
    h_hat = h * (h.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    key_hat = key * (key.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    score = (h_hat.to(h) * weight.to(h) * key_hat.to(h)).float().sum(-1) / h.shape[-1] ** 0.5
    if signed_sqrt:
        score = score.sign() * score.abs().clamp(min=1e-6).sqrt()
    gate = score.sigmoid()
    return gate[..., None].to(h) * value[:, None], gate


def gradients(run: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results and gradients of a call on these inputs, which keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(*leaves)
    grads = [grad.to(x) for grad, x in zip(grads, results, strict=True)]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, grads))]


@pytest.mark.parametrize("number", range(len(SHAPES) * (1 if DEVICE == "cpu" else len(VARIANTS))))
def test_gate_and_gradients_equal_the_formula(number: int) -> None:
    shape, turn = SHAPES[number % len(SHAPES)], number // len(SHAPES)
    dtype, signed_sqrt = VARIANTS[(number + turn) % len(VARIANTS)]
    inputs = gate_inputs(*shape, dtype)
    grads = [torch.randn(shape).to(DEVICE, dtype), torch.randn(shape[:2]).to(DEVICE)]
    options = {"eps": 1e-6, "signed_sqrt": signed_sqrt}

    def kernel(*x: Tensor) -> tuple[Tensor, Tensor]:
        return engram_gate(*x, **options, backend="triton")

    def oracle(*x: Tensor) -> tuple[Tensor, Tensor]:
        return engram_gate(*x, **options, backend="ref")

    got = gradients(kernel, inputs, grads)
    baseline = gradients(lambda *x: plain_gate(*x, **options), inputs, grads)
    expected = gradients(oracle, [x.double() for x in inputs], grads)
    for i, (x, base, y) in enumerate(zip(got, baseline, expected, strict=True)):
        assert x.dtype == [dtype, torch.float32, *(z.dtype for z in inputs)][i]
        if dtype == torch.float32 or i == 1:  # in fp32, where the root magnifies what s is off by
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=2e-5)
        else:
            assert_close_rows(x, base, y, eps=2e-3)


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    h, key, value, weight = gate_inputs(9, 4, 64, torch.bfloat16)
    out, gate = engram_gate(h, key, value, weight, eps=1e-20, backend="triton")
    wide, same = engram_gate(
        h.float(), key.float(), value.float(), weight, eps=1e-20, backend="triton"
    )
    torch.testing.assert_close(gate, same, rtol=1e-5, atol=0)
    assert torch.equal(out, (gate[..., None] * value.float()[:, None]).to(torch.bfloat16))
    torch.testing.assert_close(wide, out.float(), rtol=2**-8, atol=1e-6)


def test_the_weights_gradient_is_the_sum_over_all_parts() -> None:
    inputs, grad = gate_inputs(11, 2, 24), torch.randn(11, 2, 24).to(DEVICE)
    _, gate, scores = engram_gate_ref(*inputs, None, 1e-6, True)
    want = engram_gate_backward_ref(grad, None, *inputs, gate, scores, True)
    for tokens_per_sum in (4, 8, 16):
        config = Config(tokens_per_sum=tokens_per_sum, channels=16)
        got = engram_gate_backward_triton(grad, None, *inputs, gate, scores, True, config)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 5])
def test_dead_tokens_pass_nothing(t: int) -> None:
    inputs = gate_inputs(t, 3, 32)
    live = torch.tensor([True, False, True, False, True])[:t].to(DEVICE)
    grads = [torch.randn(t, 3, 32).to(DEVICE), torch.randn(t, 3).to(DEVICE)]

    def run(mask: Tensor | None, backend: str) -> list[Tensor]:
        return gradients(
            lambda *x: engram_gate(*x, eps=1e-6, live=mask, backend=backend), inputs, grads
        )

    got, everything = run(live, "triton"), run(None, "triton")
    for x, y, z in zip(got[:-1], everything[:-1], run(live, "ref")[:-1], strict=True):
        assert torch.equal(x[live], y[live])
        assert (x[~live] == 0).all()
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[-1], run(live, "ref")[-1], rtol=1e-4, atol=1e-5)
    assert t > 0 or (got[-1] == 0).all()


def test_tokens_do_not_depend_on_each_other() -> None:
    inputs, order = gate_inputs(5, 3, 48), torch.tensor([3, 0, 4, 2, 1]).to(DEVICE)
    grads = [torch.randn(5, 3, 48).to(DEVICE), torch.randn(5, 3).to(DEVICE)]

    def run(rows: Tensor | slice, weight: Tensor) -> list[Tensor]:
        some = [x[rows] for x in inputs[:3]]
        return gradients(
            lambda *x: engram_gate(*x, eps=1e-6, backend="triton"),
            [*some, weight],
            [x[rows] for x in grads],
        )

    want, weight = run(slice(None), inputs[3]), inputs[3]
    for rows in (order, slice(3, 4), slice(1, 5)):
        for got, all_rows in zip(run(rows, weight)[:-1], want[:-1], strict=True):
            assert torch.equal(got, all_rows[rows])
    assert torch.equal(run(slice(None), weight)[-1], want[-1])
    inputs[1][3, 2, 7] = math.nan
    bad = run(slice(None), weight)
    assert bad[0].isnan().flatten(2).all(2).nonzero().tolist() == [[3, 2]]
    assert torch.equal(bad[0][4:], want[0][4:])
    for got, good in zip(bad[2:5], want[2:5], strict=True):  # h, key, value
        assert got[3].isnan().any()
        assert torch.equal(got[4:], good[4:])


def test_tokens_and_streams_beyond_32_bits() -> None:
    h, key, value, weight = gate_inputs(3, 2, 16, torch.bfloat16)
    grads = [torch.randn(3, 2, 16).to(h), torch.randn(3, 2).to(DEVICE)]
    stride = 2**30 + 16  # the last token lies 2^31 numbers behind the first

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return gradients(
            lambda *x: engram_gate(*x, eps=1e-6, backend="triton"), [*inputs, weight], grads
        )

    want = run([h, key, value])
    for lay_apart in (  # 4 GB each: one at a time
        lambda: [far(h, (stride, 16, 1)), key, value],
        lambda: [h, far(key, (16, 2 * stride, 1)), value],
        lambda: [h, key, far(value, (stride, 1))],
    ):
        assert all(map(torch.equal, run(lay_apart()), want))


def test_no_gradient_passes_a_clamped_score() -> None:
    h, key, value, weight = gate_inputs(4, 2, 16)
    key = key.clone()
    eye = torch.eye(16).to(DEVICE)
    h[0], key[0] = eye[:2], eye[2:4]  # s = 0
    h[1], key[1] = eye[:2], eye[2:4] + 1e-7 * eye[:2]  # s below 1e-6
    h[2] = 0
    grads = [torch.ones(4, 2, 16).to(DEVICE), torch.zeros(4, 2).to(DEVICE)]
    _, gate, d_h, d_key, d_value, d_weight = gradients(
        lambda *x: engram_gate(*x, eps=1e-20, backend="triton"), [h, key, value, weight], grads
    )
    half = torch.full((2,), 0.5, device=DEVICE)
    torch.testing.assert_close(gate[0], half, rtol=0, atol=0)
    torch.testing.assert_close(gate[1], half + 1e-3 / 4, rtol=1e-6, atol=0)
    for grad in (d_h, d_key):
        assert (grad[:3] == 0).all()
        assert (grad[3].abs().sum(-1) > 0).all()
    torch.testing.assert_close(d_value[0], torch.ones(16).to(DEVICE))
    assert d_weight.isfinite().all()


def test_the_operators_describe_themselves_to_pytorch() -> None:
    leaves = [x.detach().requires_grad_() for x in gate_inputs(2, 3, 16)]
    live = torch.tensor([True, False]).to(DEVICE)
    forward = torch.ops.model1.engram_gate.default
    torch.library.opcheck(forward, (*leaves, live, 1e-6, True, "triton"))
    inputs = [x.detach() for x in leaves]
    out, gate, scores = engram_gate_ref(*inputs, live, 1e-6, True)
    backward = torch.ops.model1.engram_gate_backward.default
    torch.library.opcheck(backward, (out, gate, *inputs, gate, scores, True, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    def step(*x: Tensor) -> Tensor:
        out, gate = engram_gate(2 * x[0], *x[1:], eps=1e-6, backend=backend)
        return out.square().sum() + gate.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in gate_inputs_once()]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def gate_inputs_once() -> list[Tensor]:
    torch.manual_seed(3)
    return gate_inputs(2, 3, 16)


def test_bad_arguments_name_value_and_rule() -> None:
    h, key, value, weight = gate_inputs(2, 3, 16)
    options = {"eps": 1e-6, "backend": "triton"}
    with pytest.raises(ValueError, match=r"h must be bfloat16, .* for triton, got torch\.float64"):
        engram_gate(h.double(), key, value, weight, **options)
    with pytest.raises(ValueError, match=r"key must be floating point, got torch\.int64"):
        engram_gate(h, key.long(), value, weight, **options)
    with pytest.raises(ValueError, match=f"value must be on {h.device}, got meta"):
        engram_gate(h, key, value.to("meta"), weight, **options)
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        engram_gate(h, key, value, weight, eps=1e-6, backend="cuda")

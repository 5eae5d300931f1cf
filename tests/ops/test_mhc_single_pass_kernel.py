"""Write-back, collapse and norm in one pass: the formula in fp64, the chain, hostile inputs."""

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
from oracles import assert_near, double_precision
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.mhc import mhc_write_back
from model1.ops.mhc.chain import mhc_collapse_norm
from model1.ops.mhc.single_pass import mhc_write_back_collapse_norm

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")


pytestmark = MARKS
NAMES = ("x", "y", "post", "comb", "pre", "weight")
SHAPES = [  # t, n, c, dtype: several tokens a program, several pieces a token, several programs
    (1, 4, 64, BF16),
    (7, 4, 768, BF16),
    (9, 4, 192, FP32),
    (3, 2, 64, FP16),
    (3, 8, 64, BF16),
    (2, 3, 40, FP32),
    (2, 8, 40, FP32),
    (2, 4, 1100, FP32),
    (5, 1, 64, BF16),
]


make_inputs = functools.partial(mhc_cases.make_inputs, names=NAMES)


def one_pass(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """What the next sublayer reads, and the streams."""
    tensors = (inputs[name] for name in NAMES)
    return list(mhc_write_back_collapse_norm(*tensors, norm_eps=1e-6, backend=backend))


def in_parts(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The same by the standard form's operators."""
    x, y, post, comb, pre, weight = (inputs[name] for name in NAMES)
    out = mhc_write_back(x, y, post, comb, backend=backend)
    return list(mhc_collapse_norm(out, pre, weight, norm_eps=1e-6, backend=backend))


def with_gradients(
    inputs: dict[str, Tensor], backend: str, dtype: Any = None, run: Any = one_pass
) -> list[Tensor]:
    """Results and gradients of the inputs, all computed in `dtype` if it is given."""
    return run_with_gradients(run, inputs, backend, dtype)


def assert_follows_the_formula(shape: tuple[int, int, int, torch.dtype]) -> None:
    torch.manual_seed(1)
    inputs = make_inputs(*shape)
    dtype = shape[3]
    got, baseline = with_gradients(inputs, "triton"), with_gradients(inputs, "ref", dtype)
    with double_precision():
        expected = with_gradients(inputs, "ref", torch.float64)
    names = ("u", "written", *(f"d_{name}" for name in NAMES))
    assert_follow_the_formula(
        dict(zip(names, zip(got, baseline, expected, strict=True), strict=True)), dtype,
        of_streams=("u", "written", "d_x", "d_y"), few=[f"d_{name}" for name in NAMES[2:]],
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs larger shapes")
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_follow_the_formula(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*GPU_SHAPES, *SHAPES, (4099, 4, 768, BF16)])
def test_results_and_gradients_follow_the_formula_on_a_gpu(
    shape: tuple[int, int, int, torch.dtype],
) -> None:
    assert_follows_the_formula(shape)


def test_it_is_the_chain_in_parts() -> None:
    """The new streams have the same bits; their collapse differs in the order of sums alone."""
    inputs = make_inputs(19, 4, 192)
    got, want = (with_gradients(inputs, "triton", None, run) for run in (one_pass, in_parts))
    assert torch.equal(got[1], want[1])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_it_is_the_chain_to_the_bit() -> None:
    inputs = {name: x.cpu() for name, x in make_inputs(3, 4, 64, BF16).items()}
    results = (with_gradients(inputs, "ref", None, run) for run in (one_pass, in_parts))
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        assert all(map(torch.equal, one_pass(inputs, "auto"), in_parts(inputs, "auto")))


def test_the_formula_by_hand() -> None:
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    y, post = torch.tensor([[100.0, 1000.0]]), torch.tensor([[0.5, 2.0]])
    comb = torch.tensor([[[0.0, 3.0], [7.0, 0.25]]])
    pre, weight = torch.tensor([[1.0, -0.5]]), torch.tensor([3.0, 5.0])
    u, out = mhc_write_back_collapse_norm(x, y, post, comb, pre, weight, norm_eps=0.0)
    assert torch.equal(out, torch.tensor([[[64.0, 640.0], [203.5, 2035.0]]]))
    # 64 - 101.75 and ten times that
    assert_near(u, torch.tensor([[-3.0, -50.0]]) / math.sqrt(50.5), 1e-5)


def test_either_gradient_may_be_missing() -> None:
    inputs = make_inputs(3, 4, 64)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    u, out = mhc_write_back_collapse_norm(*leaves, norm_eps=1e-6, backend="triton")
    grads = torch.randn_like(u), torch.randn_like(out)
    one = torch.autograd.grad(u, leaves, grads[0], retain_graph=True)
    other = torch.autograd.grad(out, leaves, grads[1], retain_graph=True)
    both = torch.autograd.grad((u, out), leaves, grads)
    assert not any(grad.any() for grad in other[4:])
    for a, b, c in zip(one, other, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-4, atol=1e-5)


def test_numbers_beyond_32_bits() -> None:
    inputs = make_inputs(2, 3, 32, BF16)
    got = with_gradients(inputs | {"x": far_apart(inputs["x"])}, "triton")
    assert all(map(torch.equal, got, with_gradients(inputs, "triton")))


def test_no_tokens() -> None:
    u, out, *grads = with_gradients(make_inputs(0, 4, 64, BF16), "triton")
    assert (u.shape, out.shape) == ((0, 64), (0, 4, 64))
    assert all(not x.any() for x in grads)


def test_the_order_of_tokens_does_not_matter() -> None:
    inputs, order = make_inputs(21, 4, 64, BF16), torch.randperm(21).to(DEVICE)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    other = {k: x if k == "weight" else x.detach()[order] for k, x in leaves.items()}
    other = {name: x.detach().requires_grad_() for name, x in other.items()}
    grads = [torch.randn_like(x) for x in one_pass(inputs, "triton")]
    results = []
    for tensors, given in ((leaves, grads), (other, [x[order] for x in grads])):
        out = one_pass(tensors, "triton")
        inner = [tensors[name] for name in NAMES[:5]]
        results.append([*out, *torch.autograd.grad(out, inner, given)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[order], b)


def test_repeated_calls_have_the_same_bits() -> None:
    inputs = make_inputs(3000 if DEVICE == "cuda" else 9, 4, 768, BF16)
    first, second = with_gradients(inputs, "triton"), with_gradients(inputs, "triton")
    assert all(map(torch.equal, first, second))


def test_a_nan_stays_in_its_token() -> None:
    inputs = make_inputs(6, 2, 64, BF16)
    want = with_gradients(inputs, "triton")
    inputs["x"][1, 1, 3] = math.nan
    got = with_gradients(inputs, "triton")
    rest = [0, 2, 3, 4, 5]
    assert got[0][1].isnan().all()
    for a, b in zip(got[:-1], want[:-1], strict=True):  # the last is a sum over tokens
        assert torch.equal(a[rest], b[rest])


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
    got = one_pass(inputs | {"x": single}, "triton")
    assert all(map(torch.equal, got, one_pass(inputs | {"x": single.contiguous()}, "triton")))


def test_the_operator_describes_itself_to_pytorch() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(2, 2, 64).values()]
    operator = torch.ops.model1.mhc_write_back_collapse_norm.default
    for backend in ("triton", "ref"):
        torch.library.opcheck(operator, (*leaves, 1e-6, backend))


def test_gradients_of_the_reference_operator_are_those_of_autograd() -> None:
    """A plug-in may take them for its own."""
    inputs = make_inputs(3, 3, 8)

    def through_operator(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        run = torch.ops.model1.mhc_write_back_collapse_norm
        return list(run(*(inputs[name] for name in NAMES), 1e-6, backend))

    got = with_gradients(inputs, "ref", None, through_operator)
    for a, b in zip(got, with_gradients(inputs, "ref"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_graph_under_torch_compile() -> None:
    assert_same_bits_in_one_graph(one_pass, make_inputs(1, 2, 64))


def test_what_kernels_do_not_take_is_refused() -> None:
    inputs = make_inputs(2, 4, 64)
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32, got .*float64"):
        one_pass(inputs | {"x": inputs["x"].double()}, "triton")
    with pytest.raises(ValueError, match=r"y must be \[2, 64\] floating point, got \[2, 63\]"):
        one_pass(inputs | {"y": inputs["y"][:, 1:]}, "triton")
    with pytest.raises(ValueError, match=r"pre must be \[2, 4\] floating point, got \[2, 3\]"):
        one_pass(inputs | {"pre": inputs["pre"][:, 1:]}, "triton")
    with pytest.raises(ValueError, match=r"weight must be \[64\] floating point, got \[63\]"):
        one_pass(inputs | {"weight": inputs["weight"][1:]}, "triton")
    with pytest.raises(BackendUnavailable, match="mhc/triton takes at most 8 streams, got 9"):
        one_pass(make_inputs(2, 9, 64), "triton")

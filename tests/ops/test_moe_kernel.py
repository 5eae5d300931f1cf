"""Expert kernels: routing, order of choices, products and gradients against the formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import double_precision
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.moe import moe_experts, moe_route
from model1.ops.moe.dispatch import grouped_mm_refusal
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.grouped_matmul.portable import Config, grouped_matmul, grouped_outer
from model1.ops.moe.portable_sort import sort_choices

pytestmark = [
    pytest.mark.triton,
    pytest.mark.any_device,
    # the interpreter computes in NumPy, which warns of what Triton does
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GROUPED_MM = pytest.mark.skipif(
    grouped_mm_refusal(torch.device(DEVICE)) is not None,
    reason="needs sm_90 with torch 2.10 or newer",
)
# t, c, m, e, topk, limit; more experts than tokens, one expert, no powers of two
SHAPES = [
    (1, 16, 16, 4, 2, None),
    (9, 40, 24, 5, 3, 1.0),
    (40, 64, 48, 3, 2, 10.0),
    (3, 24, 8, 37, 4, None),
    (33, 16, 16, 1, 1, 2.0),
]
# Their gradients in fp64, one full copy of the weights for each, take 3 GB at most.
GPU_SHAPES = [
    (1, 2048, 1024, 8, 6, 10.0),
    (100, 512, 384, 7, 3, 1.0),
    (2000, 1024, 512, 24, 6, 10.0),
    (50, 264, 136, 100, 8, None),
    (777, 128, 64, 1, 1, None),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(t: int, c: int, m: int, e: int, topk: int, dtype: torch.dtype = FP32) -> Inputs:
    """Half of the tokens want the same experts; some ids are of no expert."""
    ids = torch.stack([torch.randperm(max(e, topk))[:topk] for _ in range(t)])
    ids[: t // 2] = ids[:1]
    if t > 2:
        ids[2, 0], ids[1, 0] = -1, e
    x, gate_up, down = torch.randn(t, c), torch.randn(e, 2 * m, c), torch.randn(e, c, m)
    parts = x, torch.rand(t, topk), ids, gate_up * c**-0.5 * 2, down * m**-0.5
    x, weights, ids, gate_up, down = (part.to(DEVICE) for part in parts)
    return x.to(dtype), weights, ids, gate_up.to(dtype), down.to(dtype)


def make_grad(x: Tensor) -> Tensor:
    """The gradient of the result, in the dtype of x."""
    torch.manual_seed(2)
    return torch.randn(x.shape).to(x)


def with_gradients(
    inputs: Inputs, limit: float | None, backend: str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """out and the gradients of x, weights, gate_up and down, computed in `dtype` if it is given."""
    x, weights, ids, gate_up, down = inputs
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_() for v in (x, weights, gate_up, down)]
    out = moe_experts(
        leaves[0], leaves[1], ids, leaves[2], leaves[3], swiglu_limit=limit, backend=backend
    )
    grad = make_grad(x).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)]


def gate_up_noise(inputs: Inputs, limit: float | None) -> Tensor:
    """The error of the rows of gate_up's gradient, as `delta_noise`, from four roundings.

    Of gate and up, of the gradient of silu(gate) up and of that of gate and up. A row is the sum
    of one number per token times x: with few tokens a baseline has it right by luck, and where
    silu is flat, at gate = -1.28, the rounding of gate is larger than the number.
    """
    x, weights, ids, gate_up, down = inputs
    grad, noise = make_grad(x).double(), torch.zeros(gate_up.shape[:2]).double().to(x.device)
    for expert in range(len(gate_up)):
        rows, choice = torch.where(ids == expert)
        token = x[rows].double()
        gate, up = (token @ gate_up[expert].double().t()).chunk(2, dim=1)
        d_act = grad[rows] @ down[expert].double() * weights[rows, choice, None]
        if limit is not None:
            d_gate_passes, d_up_passes = gate <= limit, up.abs() <= limit
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        else:
            d_gate_passes = d_up_passes = torch.ones_like(gate)
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        bend = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))
        of_gate = 3 * (up * slope).square() + (up * bend * gate).square()
        of_up = 2 * (gate * sigmoid).square() + (slope * gate).square()
        squares = torch.cat([of_gate * d_gate_passes, of_up * d_up_passes], dim=1)
        squares *= d_act.square().repeat(1, 2) * token.square().sum(1, keepdim=True)
        noise[expert] = squares.sum(0).sqrt()
    return torch.finfo(x.dtype).eps / 2 * noise


def assert_follows_the_formula(
    shape: tuple[int, int, int, int, int, float | None], dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(1)
    inputs = make_inputs(*shape[:5], dtype)
    got = with_gradients(inputs, shape[5], backend)
    with double_precision():
        want = with_gradients(inputs, shape[5], "ref", torch.float64)
    base = want if dtype == FP32 else with_gradients(inputs, shape[5], "ref")
    for name, a, b, z in zip(
        ("out", "x", "weights", "gate_up", "down"), got, base, want, strict=True
    ):
        length, noise = z.detach().norm(dim=-1), 0.0
        if dtype == FP32:  # terms of a row may cancel: they are rounded at their own size
            noise = 1e-6 * length.max().item()
        elif name == "weights":  # a number per choice, right in the baseline by luck
            noise = torch.finfo(dtype).eps * length.max().item()
        elif name in ("x", "down"):  # sums over few choices: so is the rounding of one number
            noise = torch.finfo(dtype).eps * length
        elif name == "gate_up":
            noise = gate_up_noise(inputs, shape[5])
        try:
            assert_close_rows(a.detach(), b.detach(), z.detach(), noise=noise)
        except AssertionError as error:
            raise AssertionError(f"{name} of {shape}") from error


@pytest.mark.skipif(HAS_GPU, reason="the GPU runs larger shapes")
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_follow_the_formula(
    shape: tuple[int, int, int, int, int, float | None],
) -> None:
    assert_follows_the_formula(shape, FP32, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_results_and_gradients_follow_the_formula_on_a_gpu(
    shape: tuple[int, int, int, int, int, float | None], dtype: torch.dtype
) -> None:
    assert_follows_the_formula(shape, dtype, "triton")


@pytest.mark.gpu
@GROUPED_MM
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_pytorchs_products_follow_the_formula(
    shape: tuple[int, int, int, int, int, float | None],
) -> None:
    assert_follows_the_formula(shape, BF16, "grouped_mm")


@pytest.mark.gpu
@GROUPED_MM
def test_auto_is_pytorchs_product_where_it_fits() -> None:
    for shape, name in (((50, 64, 48, 5, 2), "grouped_mm"), ((50, 60, 48, 5, 2), "triton")):
        inputs = make_inputs(*shape, BF16)
        got, want = with_gradients(inputs, None, "auto"), with_gradients(inputs, None, name)
        assert all(map(torch.equal, got, want))


@pytest.mark.gpu
def test_repeated_calls_have_the_same_bits() -> None:
    inputs = make_inputs(1500, 256, 128, 30, 4, BF16)
    for backend in ("triton", "auto"):
        first, second = (with_gradients(inputs, 10.0, backend) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("size", [(0, 2, 3), (1, 1, 1), (50, 3, 7), (300, 6, 200), (2000, 2, 5)])
def test_choices_are_sorted_stably_by_expert(size: tuple[int, int, int]) -> None:
    t, topk, e = size
    ids = torch.randint(-1, e + 1, (t, topk))
    if t > 1:
        ids[0, 0], ids[1, 0] = 2**40, -(2**40)
    positions, ends = sort_choices(ids.to(DEVICE), e)
    flat = ids.flatten()
    is_expert = (flat >= 0) & (flat < e)
    order = torch.where(is_expert, flat, e).argsort(stable=True)
    want = torch.empty_like(order)
    want[order] = torch.arange(len(order))
    assert torch.equal(positions.cpu().flatten().long(), torch.where(is_expert, want, -1))
    counts = torch.stack([(flat == expert).sum() for expert in range(e)])
    assert torch.equal(ends.cpu().long(), counts.cumsum(0))


@pytest.mark.parametrize("lengths", [[0, 5, 0, 40, 1], [17], [0, 0], [16, 16, 0]])
def test_products_of_groups_and_of_empty_ones(lengths: list[int]) -> None:
    """Rows behind the last end are NaN and stay out of everything."""
    m, n, k = sum(lengths), 24, 40
    ends = torch.tensor(lengths).cumsum(0).to(DEVICE, torch.int32)
    a = torch.full((m + 3, k), math.nan, device=DEVICE)
    y = torch.full((m + 3, n), math.nan, device=DEVICE)
    a[:m], y[:m] = torch.randn(m, k).to(DEVICE), torch.randn(m, n).to(DEVICE)
    b = torch.randn(len(lengths), n, k).to(DEVICE)
    config = Config(16, 16, 16, 4, 1)
    out = grouped_matmul(a, b, ends, config=config)
    back = grouped_matmul(y, b, ends, transpose_b=True, config=config)
    outer = grouped_outer(y, a, ends, config=config)
    assert out[m:].isnan().all()
    start = 0
    for group, length in enumerate(lengths):
        rows = slice(start, start + length)
        for got, want in (
            (out[rows], a[rows].double() @ b[group].double().t()),
            (back[rows], y[rows].double() @ b[group].double()),
            (outer[group], y[rows].double().t() @ a[rows].double()),
        ):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        start += length


def route(logits: Tensor, bias: Tensor, topk: int, backend: str) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    weights, ids = moe_route(logits, bias, topk=topk, scaling=2.5, backend=backend)
    torch.manual_seed(3)
    grad = torch.randn(weights.shape).to(weights)
    return [weights, *torch.autograd.grad(weights, logits, grad), ids]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "size", [(0, 4, 2), (5, 6, 2), (33, 64, 6), (3, 300, 8), (7, 1, 1), (2, 5, 5)]
)
def test_routing_is_that_of_the_reference(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, e, topk = size
    # few values: equal scores are common, and the rule for them is the same
    logits = (torch.randint(-12, 12, (t, e)) / 3).to(dtype).to(DEVICE)
    bias = (torch.arange(e) % 2).float().to(DEVICE)
    wide = torch.full((e, t, 2), math.nan, dtype=dtype, device=DEVICE)
    wide[..., 1] = logits.t()
    want = route(logits, bias, topk, "ref")
    for strange in (logits, wide[..., 1].t()):
        got = route(strange, bias, topk, "triton")
        assert torch.equal(got[2], want[2])
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == FP32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], **tolerance)


def test_equal_scores_go_to_the_lower_expert_and_nan_is_above_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [math.nan, 9.0, math.inf, 0.0]]).to(DEVICE)
    for backend in ("ref", "triton"):
        weights, ids = moe_route(
            logits, torch.zeros(4, device=DEVICE), topk=2, scaling=1.0, backend=backend
        )
        assert ids.tolist() == [[1, 2], [0, 2]]
        assert weights[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
        assert weights[1].isnan().any()


def test_logits_that_vanish_keep_weights_and_gradients_finite() -> None:
    logits = torch.tensor([[-200.0, 1.0, -300.0], [-200.0] * 3, [80.0, 90.0, -50.0]]).to(DEVICE)
    got, want = (
        route(logits, torch.zeros(3, device=DEVICE), 3, name) for name in ("triton", "ref")
    )
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_token_depends_on_itself_alone() -> None:
    x, weights, ids, gate_up, down = make_inputs(21, 40, 24, 5, 3)
    order = torch.randperm(21).to(DEVICE)
    want = with_gradients((x, weights, ids, gate_up, down), 1.0, "triton")[0]
    moved = x[order], weights[order], ids[order], gate_up, down
    assert torch.equal(with_gradients(moved, 1.0, "triton")[0], want[order])
    few = x[:8], weights[:8], ids[:8], gate_up, down
    assert torch.equal(with_gradients(few, 1.0, "triton")[0], want[:8])


def test_experts_that_nobody_chose_are_not_read_and_get_zeros() -> None:
    x, weights, ids, gate_up, down = make_inputs(6, 16, 8, 5, 2)
    ids = ids.clamp(0, 2)
    gate_up[3:], down[3:] = math.nan, math.nan
    results = with_gradients((x, weights, ids, gate_up, down), 10.0, "triton")
    assert all(result.isfinite().all() for result in results)
    assert not results[3][3:].any()
    assert not results[4][3:].any()


def test_no_tokens_and_no_expert_for_any() -> None:
    x, weights, ids, gate_up, down = make_inputs(3, 16, 8, 4, 2)
    none = x[:0], weights[:0], ids[:0], gate_up, down
    nobody = x, weights, torch.full_like(ids, -1), gate_up, down
    for inputs in (none, nobody):
        results = with_gradients(inputs, None, "triton")
        assert [r.shape for r in results] == [v.shape for v in (inputs[0], *inputs)][:2] + [
            v.shape for v in (inputs[1], gate_up, down)
        ][: len(results) - 2]
        assert not any(result.any() for result in results)


def test_a_nan_stays_in_its_token() -> None:
    x, weights, ids, gate_up, down = make_inputs(8, 16, 8, 4, 2)
    want = with_gradients((x, weights, ids, gate_up, down), 10.0, "triton")[0]
    x[5, 3] = math.nan
    got = with_gradients((x, weights, ids, gate_up, down), 10.0, "triton")[0]
    assert got[5].isnan().all()
    rest = [i for i in range(8) if i != 5]
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_the_operators_describe_themselves_to_pytorch(backend: str) -> None:
    ops = torch.ops.model1
    logits = torch.randn(3, 5).to(DEVICE).requires_grad_()
    bias = torch.zeros(5, device=DEVICE)
    torch.library.opcheck(ops.moe_route.default, (logits, bias, 2, 1.5, backend))
    x, weights, ids, gate_up, down = make_inputs(3, 16, 8, 4, 2)
    ids = ids.clamp(0, 3)  # rows that nobody has stay unwritten: NaN, which nothing is equal to
    leaves = [v.requires_grad_() for v in (x, weights, gate_up, down)]
    arguments = leaves[0], leaves[1], ids, leaves[2], leaves[3], 1.0, backend
    torch.library.opcheck(ops.moe_experts.default, arguments)


def test_gradients_of_the_reference_operators_are_those_of_autograd() -> None:
    """A plug-in may take them for its own."""
    x, weights, ids, gate_up, down = make_inputs(9, 16, 8, 4, 2)
    x *= 3
    logits, bias = torch.randn(3, 5).to(DEVICE).requires_grad_(), torch.zeros(5, device=DEVICE)
    leaves = [v.requires_grad_() for v in (x, weights, gate_up, down)]
    ops = torch.ops.model1
    results = []
    for through_operators in (True, False):
        if through_operators:
            routed = ops.moe_route(logits, bias, 2, 1.5, "ref")
            out = ops.moe_experts(x, weights, ids, gate_up, down, 1.0, "ref")[0]
        else:
            routed = moe_route(logits, bias, topk=2, scaling=1.5, backend="ref")
            out = moe_experts(
                x, weights, ids, gate_up, down, swiglu_limit=1.0, backend="ref"
            )  # fmt: skip
        total = out.square().sum() + (routed[0] * torch.arange(2, device=DEVICE)).sum()
        results.append(torch.autograd.grad(total, [*leaves, logits]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_graph_under_torch_compile() -> None:
    x, _, _, gate_up, down = make_inputs(3, 16, 8, 4, 2)
    logits, bias = torch.randn(3, 4).to(DEVICE), torch.zeros(4, device=DEVICE)

    def step(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, ids = moe_route(logits, bias, topk=2, scaling=1.0, backend="triton")
        return moe_experts(2 * x, weights, ids, gate_up, down, swiglu_limit=1.0, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        leaves = [v.detach().clone().requires_grad_() for v in (x, logits, gate_up, down)]
        grads.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *grads))


def test_what_kernels_do_not_take_is_refused() -> None:
    x, weights, ids, gate_up, down = make_inputs(3, 16, 8, 4, 2)
    options = {"swiglu_limit": None, "backend": "triton"}
    with pytest.raises(ValueError, match=r"gate_up must be \[e, 2 \* m, 16\], got \[4, 16, 15\]"):
        moe_experts(x, weights, ids, gate_up[..., 1:], down, **options)
    with pytest.raises(ValueError, match=r"down must be \[4, 16, 8\], got \[3, 16, 8\]"):
        moe_experts(x, weights, ids, gate_up, down[1:], **options)
    with pytest.raises(ValueError, match=r"x must be \[t, c\], .*, got \[3, 16\] torch.float64"):
        moe_experts(x.double(), weights, ids, gate_up, down, **options)
    with pytest.raises(ValueError, match=r"expert_ids must be int64, got torch\.int32"):
        moe_experts(x, weights, ids.int(), gate_up, down, **options)
    with pytest.raises(ValueError, match="e must be at most 4096, got 5000"):
        moe_route(
            torch.zeros(1, 5000, device=DEVICE), torch.zeros(5000, device=DEVICE), topk=1,
            scaling=1.0, backend="triton",
        )  # fmt: skip
    if not HAS_GPU:
        with pytest.raises(BackendUnavailable, match="grouped_mm needs an sm_90 GPU"):
            moe_experts(x, weights, ids, gate_up, down, swiglu_limit=None, backend="grouped_mm")

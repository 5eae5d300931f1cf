"""Experts in FP8: the kernels against the emulation, the emulation against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model1.ops.moe import moe_experts
from model1.ops.moe.fp8 import Fp8Experts, moe_experts_fp8, quantize_experts

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.any_device,
    # the interpreter computes in NumPy, which warns of what Triton does
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPES = [(9, 40, 24, 5, 3), (20, 144, 136, 3, 2), (2, 128, 128, 7, 1)]  # t, c, m, e, topk
Inputs = tuple[Tensor, Tensor, Tensor, Fp8Experts, Fp8Experts]


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """Arguments, the first id of no expert, and the weights before they were quantised."""
    t, c, m, e, topk = shape
    ids = torch.stack([torch.randperm(e)[:topk] for _ in range(t)]).to(DEVICE)
    ids[0, 0] = -1
    gate_up = (torch.randn(e, 2 * m, c) * c**-0.5 * 2).to(DEVICE)
    down = (torch.randn(e, c, m) * m**-0.5).to(DEVICE)
    x, weights = torch.randn(t, c).to(DEVICE, dtype), torch.rand(t, topk).to(DEVICE)
    quantized = (quantize_experts(w, backend="ref") for w in (gate_up, down))
    first, second = quantized
    return (x, weights, ids, first, second), (gate_up, down)


@pytest.mark.parametrize("shape", [*SHAPES, (500, 512, 384, 16, 4)] if HAS_GPU else SHAPES)
def test_kernels_follow_the_emulation(shape: tuple[int, ...]) -> None:
    """A number in the middle of two codes may go either way: the rest are equal but for sums."""
    inputs, exact = make_inputs(shape)
    got, want = (
        moe_experts_fp8(*inputs, swiglu_limit=1.0, backend=name) for name in ("triton", "ref")
    )
    # FP8 units add with fewer bits, which moves more numbers of the second product
    assert (got - want).norm() < (1e-2 if HAS_GPU else 2e-3) * want.norm()
    formula = moe_experts(*inputs[:3], *exact, swiglu_limit=1.0, backend="ref")
    # five roundings of 2.7 % each, and SwiGLU multiplies two of the results
    assert (want - formula).norm() < 0.12 * formula.norm()


@pytest.mark.gpu
def test_bf16_follows_the_emulation() -> None:
    inputs, _ = make_inputs((300, 512, 384, 16, 4), torch.bfloat16)
    got, want = (
        moe_experts_fp8(*inputs, swiglu_limit=10.0, backend=name) for name in ("auto", "ref")
    )
    assert (got - want).norm() < 2e-2 * want.norm()


def test_a_token_depends_on_itself_alone_and_keeps_its_nan() -> None:
    (x, weights, ids, gate_up, down), _ = make_inputs((21, 40, 24, 5, 3))
    options = {"swiglu_limit": 1.0, "backend": "triton"}
    want = moe_experts_fp8(x, weights, ids, gate_up, down, **options)
    order = torch.randperm(21).to(DEVICE)
    got = moe_experts_fp8(x[order], weights[order], ids[order], gate_up, down, **options)
    assert torch.equal(got, want[order])
    x[5, 3] = math.nan
    got = moe_experts_fp8(x, weights, ids, gate_up, down, **options)
    rest = [i for i in range(21) if i != 5]
    assert torch.equal(got[rest], want[rest])
    assert got[5].isnan().all()


def test_no_tokens_and_no_expert_for_any() -> None:
    (x, weights, ids, gate_up, down), _ = make_inputs((3, 40, 24, 5, 2))
    options = {"swiglu_limit": None, "backend": "triton"}
    assert moe_experts_fp8(x[:0], weights[:0], ids[:0], gate_up, down, **options).shape == (0, 40)
    nobody = moe_experts_fp8(x, weights, torch.full_like(ids, 9), gate_up, down, **options)
    assert not nobody.any()


def test_the_operator_describes_itself_to_pytorch() -> None:
    (x, weights, ids, gate_up, down), _ = make_inputs((3, 40, 24, 5, 2))
    for backend in ("ref", "triton"):
        arguments = x, weights, ids, *gate_up, *down, 1.0, backend
        torch.library.opcheck(
            torch.ops.model1.moe_experts_fp8.default, arguments, test_utils="test_faketensor"
        )


def test_wrong_arguments_are_named() -> None:
    (x, weights, ids, gate_up, down), (plain, _) = make_inputs((3, 40, 24, 5, 2))
    options = {"swiglu_limit": None, "backend": "triton"}
    with pytest.raises(ValueError, match=r"w_scale must be \[5, 1, 4\] float32, contiguous, got"):
        moe_experts_fp8(
            x, weights, ids, gate_up._replace(w_scale=gate_up.w_scale[..., :1]), down, **options
        )
    with pytest.raises(ValueError, match=r"w_fp8 must be float8_e4m3fn, contiguous, got torch"):
        moe_experts_fp8(x, weights, ids, gate_up._replace(w_fp8=plain), down, **options)
    with pytest.raises(ValueError, match="must not need gradients"):
        moe_experts_fp8(x.requires_grad_(), weights, ids, gate_up, down, **options)
    with pytest.raises(ValueError, match=r"weight must be \[e, n, k\], e > 0, got \[48, 40\]"):
        quantize_experts(plain[0])

"""FP8 kernels: bits of the reference's quantisation, products, gradients, hostile inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model1.ops.fp8_linear import fp8_linear, fp8_matmul
from model1.ops.fp8_linear.choice import scaled_mm_refusal
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.any_device,
    # the interpreter computes in NumPy, which warns of what Triton does
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(1, 128), (37, 200), (130, 256), (0, 64), (16, 40), (129, 1)]
# Hopper's FP8 units add the products of an instruction with about 14 bits.
UNIT_NOISE = 5e-4 if HAS_GPU else 0.0
SIZES = [(5, 64, 48), (130, 200, 136), (17, 384, 33)]  # t, c, o
GPU_SIZES = [(1, 4096, 4096), (1000, 1536, 640), (4097, 2048, 4096), (300, 200, 136)]
SCALED_MM = pytest.mark.skipif(
    scaled_mm_refusal(torch.device(DEVICE)) is not None,
    reason="needs sm_90 with torch 2.10 and CUDA 12.9 or newer",
)


def quantize(x: Tensor, kind: str, power_of_two: bool, backend: str) -> tuple[Tensor, ...]:
    return torch.ops.model1.fp8_quantize(x, kind, power_of_two, backend)


def hostile(t: int, c: int, dtype: torch.dtype) -> Tensor:
    """Columns of very different sizes, zeros, the largest numbers, and what is not finite."""
    x = torch.randn(t, c) * torch.logspace(-30, 30, c)
    if t > 4 and c > 9:
        x[3], x[2, 5], x[1, 7], x[0, 3] = 0.0, math.nan, math.inf, torch.finfo(dtype).max
        x[4, 1] = torch.finfo(dtype).tiny / 4
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize("kind", ["rows", "both", "blocks"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantisation_has_the_bits_of_the_reference(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = hostile(*shape, dtype)
    for power_of_two in (True, False):
        got, want = (quantize(x, kind, power_of_two, name) for name in ("triton", "ref"))
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            assert a.dtype == b.dtype
            is_code = number % 2 == 0
            if is_code and not power_of_two and HAS_GPU:
                # a division that is not rounded to nearest moves numbers between two codes
                differs = a.view(torch.uint8) != b.view(torch.uint8)
                assert differs.float().mean() < 1e-3 or not differs.numel()
            else:
                torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def test_a_matrix_may_lie_anywhere() -> None:
    x = hostile(40, 200, FP32)
    wide = torch.full((40, 200, 3), math.nan, device=DEVICE)
    wide[..., 1] = x
    turned = x.t().contiguous().t()
    for kind in ("rows", "both", "blocks"):
        want = quantize(x, kind, True, "triton")
        for other in (wide[..., 1], turned):
            for a, b in zip(quantize(other, kind, True, "triton"), want, strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def with_gradients(x: Tensor, w: Tensor, dy: Tensor, backend: str, **options: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    y = fp8_linear(*leaves, backend=backend, **options)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def make_linear(t: int, c: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    parts = torch.randn(t, c), torch.randn(o, c), torch.randn(t, o)
    x, w, dy = (part.to(DEVICE, dtype) for part in parts)
    return x, w, dy


def assert_follows_the_reference(
    size: tuple[int, int, int], dtype: torch.dtype, backend: str
) -> None:
    """The same codes: only the order of fp32 sums and the last rounding differ."""
    x, w, dy = make_linear(*size, dtype)
    got = with_gradients(x, w, dy, backend)
    # in fp32, so that the reference's own rounding is not in the way
    want = with_gradients(x.float(), w.float(), dy.float(), "ref")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        noise = UNIT_NOISE * b.detach().norm(dim=-1).double()
        assert_close_rows(a.detach(), b.detach().to(dtype), b.detach(), noise=noise)


@pytest.mark.skipif(HAS_GPU, reason="the GPU runs larger sizes")
@pytest.mark.parametrize("size", SIZES)
def test_products_and_gradients_follow_the_reference(size: tuple[int, int, int]) -> None:
    assert_follows_the_reference(size, FP32, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", GPU_SIZES)
def test_products_and_gradients_follow_the_reference_on_a_gpu(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_follows_the_reference(size, dtype, "triton")


@pytest.mark.gpu
@SCALED_MM
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [*GPU_SIZES[:3], (0, 256, 128), (7, 144, 272)])
def test_pytorchs_product_follows_the_reference(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_follows_the_reference(size, dtype, "scaled_mm")


@pytest.mark.gpu
@SCALED_MM
def test_auto_is_pytorchs_product_for_whole_blocks() -> None:
    for size, name in (((40, 256, 384), "scaled_mm"), ((40, 256, 200), "triton")):
        arguments = make_linear(*size, BF16)
        got, want = with_gradients(*arguments, "auto"), with_gradients(*arguments, name)
        assert all(map(torch.equal, got, want))


def test_no_tokens() -> None:
    y, d_x, d_w = with_gradients(*make_linear(0, 64, 48, FP32), "triton")
    assert y.shape == (0, 48)
    assert d_x.shape == (0, 64)
    assert torch.equal(d_w, torch.zeros_like(d_w))


def test_a_token_depends_on_itself_alone() -> None:
    x, w, dy = make_linear(150, 256, 64, FP32)
    y, d_x, _ = with_gradients(x, w, dy, "triton")
    order = torch.randperm(150).to(DEVICE)
    other = with_gradients(x[order], w, dy[order], "triton")
    assert torch.equal(other[0], y[order])
    assert torch.equal(other[1], d_x[order])
    few = with_gradients(x[:37], w, dy[:37], "triton")
    assert torch.equal(few[0], y[:37])


def test_a_nan_stays_in_its_token() -> None:
    x, w, dy = make_linear(20, 256, 64, FP32)
    want = with_gradients(x, w, dy, "triton")[0]
    x[3, 200] = math.nan
    got = with_gradients(x, w, dy, "triton")[0]
    assert got[3].isnan().all()
    rest = [i for i in range(20) if i != 3]
    assert torch.equal(got[rest], want[rest])


def test_codes_of_minus_zero_and_scales_of_both_kinds() -> None:
    a = torch.randn(9, 256).to(DEVICE)
    a[:, ::3] = -0.0
    for b_is_blocks in (True, False):
        left = quantize(a, "rows", True, "ref")[:2]
        kind = "blocks" if b_is_blocks else "rows"
        right = quantize(torch.randn(48, 256).to(DEVICE), kind, False, "ref")[:2]
        options = {"b_is_blocks": b_is_blocks, "out_dtype": FP32}
        got, want = (
            fp8_matmul(*left, *right, **options, backend=name) for name in ("triton", "ref")
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 + 40 * UNIT_NOISE)


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_the_operators_describe_themselves_to_pytorch(backend: str) -> None:
    x, w, _ = make_linear(3, 40, 16, FP32)
    ops = torch.ops.model1
    for kind in ("rows", "both", "blocks"):
        torch.library.opcheck(
            ops.fp8_quantize.default, (x, kind, True, backend), test_utils="test_faketensor"
        )
    quantized = ops.fp8_quantize(w, "blocks", True, backend)
    for keep in (True, False):
        torch.library.opcheck(
            ops.fp8_linear.default, (x, w, *quantized, True, keep, backend),
            test_utils="test_faketensor",
        )  # fmt: skip
    x_fp8_t, x_scale_t = ops.fp8_linear(x, w, *quantized, True, True, backend)[1:]
    for needs in ((True, True), (False, True), (True, False)):
        arguments = torch.randn(3, 16).to(x), w, x_fp8_t, x_scale_t, *quantized[2:], *needs, True
        torch.library.opcheck(
            ops.fp8_linear_backward.default, (*arguments, backend), test_utils="test_faketensor"
        )


def test_one_graph_under_torch_compile() -> None:
    x, w, dy = make_linear(3, 40, 16, FP32)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return fp8_linear(2 * x, w, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = run(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(map(torch.equal, *results))

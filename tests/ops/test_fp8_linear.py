"""FP8 linear maps on the reference: quantisation by search in fp64, products, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from backend_option import TESTED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.fp8_linear import (
    Fp8Weight,
    choice,
    fp8_linear,
    quantize_columns,
    quantize_rows,
    quantize_weight,
)

E4M3 = sorted(
    {x for x in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
     if not math.isnan(x)}
)  # fmt: skip


def golden(group: list[float], scale_format: str) -> tuple[list[float], float]:
    """Codes and scale of one group, in fp64 and by search over all codes."""
    if not all(map(math.isfinite, group)):
        return [0.0] * len(group), math.nan
    amax = max(map(abs, group))
    scale = 1.0
    if amax > 0 and scale_format == "fp32":
        third = torch.tensor(amax) * (torch.tensor(1.0) / 448.0)
        scale = max(third.item(), 2.0**-126)
    elif amax > 0:
        k = -126
        while amax > 448.0 * 2.0**k:
            k += 1
        scale = 2.0**k
    inverse = (1.0 / torch.tensor(scale)).item()
    scaled = [(torch.tensor(x) * inverse).item() for x in group]
    return [nearest(x) for x in scaled], scale


def nearest(x: float) -> float:
    """The e4m3 number next to x; of two the one with an even last bit."""
    distance = min(abs(code - x) for code in E4M3)
    found = [code for code in E4M3 if abs(code - x) == distance]
    even = [
        c for c in found if not int(torch.tensor(c).to(torch.float8_e4m3fn).view(torch.uint8)) & 1
    ]
    return (even or found)[0]


@given(
    t=st.integers(1, 3), c=st.integers(1, 260), size=st.sampled_from([-38, -20, 0, 3, 38]),
    scale_format=st.sampled_from(["ue8m0", "fp32"]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_rows_equal_a_search_in_fp64(
    t: int, c: int, size: int, scale_format: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(t, c) * 10.0**size
    x[0, : c // 2] = 0.0
    codes, scale = quantize_rows(x, scale_format=scale_format, backend=TESTED)
    assert codes.shape == (t, c)
    assert scale.shape == (t, -(-c // 128))
    for i in range(t):
        for g in range(scale.shape[1]):
            part = slice(128 * g, min(c, 128 * (g + 1)))
            want, want_scale = golden(x[i, part].tolist(), scale_format)
            assert scale[i, g].item() == pytest.approx(want_scale, rel=0, nan_ok=True)
            assert codes[i, part].float().tolist() == want


def test_scales_at_the_edges_of_powers_of_two() -> None:
    largest = torch.tensor([[448.0], [449.0], [447.0], [1.75], [1.7500001], [1e-45], [0.0]])
    _, scale = quantize_rows(largest, backend=TESTED)
    assert scale[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0**-8, 2.0**-7, 2.0**-126, 1.0]
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_group_alone(bad: float) -> None:
    x = torch.randn(3, 300)
    want = dequantized(*quantize_rows(x, backend=TESTED))
    x[1, 130] = bad
    got = dequantized(*quantize_rows(x, backend=TESTED))
    assert got[1, 128:256].isnan().all()
    want[1, 128:256] = math.nan
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double().repeat_interleave(128, 1)[:, : codes.shape[1]]


def dequantized_weight(weight: Fp8Weight) -> Tensor:
    o, c = weight.w_fp8.shape
    scale = weight.w_scale.double().repeat_interleave(128, 0)[:o].repeat_interleave(128, 1)[:, :c]
    return weight.w_fp8.double() * scale


@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
def test_columns_are_rows_of_the_transpose_and_blocks_have_the_largest_scale(
    scale_format: str,
) -> None:
    x = torch.randn(150, 40) * torch.logspace(-3, 3, 40)
    options = {"scale_format": scale_format, "backend": TESTED}
    for got, want in zip(
        quantize_columns(x, **options), quantize_rows(x.t(), **options), strict=True
    ):
        assert torch.equal(got.float(), want.float())
    weight = quantize_weight(x, **options)
    assert weight.w_scale.shape == (2, 4)
    assert weight.w_scale_t.shape == (1, 4)
    assert torch.equal(weight.w_fp8.t().float(), weight.w_fp8_t.float())
    assert torch.equal(weight.w_scale[:, 0], weight.w_scale_t[0, :2])
    flat = quantize_rows(x[:128].reshape(1, -1)[:, x[:128].abs().argmax()][None], **options)
    assert weight.w_scale[0, 0] == flat[1][0, 0]
    step = weight.w_scale.max() * 32 / 2  # half the distance of the largest codes
    assert (dequantized_weight(weight) - x).abs().max() <= step * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(5, 64, 48), (130, 200, 136), (1, 1, 1), (128, 128, 128)])
def test_forward_and_both_gradients_are_products_of_quantised_factors(
    shape: tuple[int, int, int],
) -> None:
    t, c, o = shape
    x, w, dy = torch.randn(t, c), torch.randn(o, c), torch.randn(t, o)
    leaves = x.requires_grad_(), w.requires_grad_()
    y = fp8_linear(*leaves, backend=TESTED)
    d_x, d_w = torch.autograd.grad(y, leaves, dy)
    rows, weight = dequantized(*quantize_rows(x)), dequantized_weight(quantize_weight(w))
    dy_rows = dequantized(*quantize_rows(dy))
    dy_columns, columns = (dequantized(*quantize_columns(z)) for z in (dy, x))
    for got, want in (
        (y, rows @ weight.t()),
        (d_x, dy_rows @ weight),
        (d_w, dy_columns @ columns.t()),
    ):
        assert_near(got, want, 1e-5 * max(1.0, want.abs().max().item()))
    exact = x.double() @ w.double().t()
    if c > 1:  # of one number the error may be the largest of both factors, 6 % each
        assert (y - exact).norm() < 0.05 * exact.norm()  # about 2.7 % of each factor


def test_a_quantised_weight_is_used_as_it_is() -> None:
    x, w = torch.randn(2, 3, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    quantized = quantize_weight(w, backend=TESTED)
    want = fp8_linear(x, w, backend=TESTED)
    assert want.shape == (2, 3, 48)
    assert torch.equal(fp8_linear(x, None, quantized=quantized, backend=TESTED), want)
    again = fp8_linear(x, w, quantized=quantized, backend=TESTED)
    grads = [torch.autograd.grad(y.square().sum(), [x, w]) for y in (want, again)]
    assert all(map(torch.equal, *grads))


def test_bf16_is_a_plain_product_by_request() -> None:
    x, w = torch.randn(4, 64), torch.randn(48, 64)
    assert torch.equal(fp8_linear(x, w, precision="bf16"), F.linear(x, w))
    quantized = quantize_weight(w)
    got = fp8_linear(x, None, quantized=quantized, precision="bf16")
    assert_near(got, x.double() @ dequantized_weight(quantized).t(), 1e-4)


def test_no_tokens() -> None:
    x, w = torch.randn(0, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    y = fp8_linear(x, w, backend=TESTED)
    d_x, d_w = torch.autograd.grad(y, [x, w], y)
    assert y.shape == (0, 48)
    assert d_x.shape == x.shape
    assert torch.equal(d_w, torch.zeros(48, 64))


def test_a_gpu_without_fp8_units_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.version, "hip", None)
    choice.fp8_refusal.cache_clear()
    for backend in ("auto", "triton", "scaled_mm"):
        with pytest.raises(BackendUnavailable, match=r"FP8 matrix units .*, device is sm_86"):
            choice.choose_backend(backend, gpu, True)
    assert choice.choose_backend("ref", gpu, True) == "ref"
    choice.fp8_refusal.cache_clear()


def test_wrong_arguments_are_named() -> None:
    x, w = torch.randn(4, 64), torch.randn(48, 64)
    with pytest.raises(ValueError, match=r"weight must be \[o, 64\], got \[48, 63\]"):
        fp8_linear(x, w[:, 1:])
    with pytest.raises(ValueError, match="precision must be one of fp8, bf16, got 'fp16'"):
        fp8_linear(x, w, precision="fp16")
    with pytest.raises(ValueError, match="scale_format must be one of ue8m0, fp32, got 'e8m0'"):
        quantize_rows(x, scale_format="e8m0")
    with pytest.raises(ValueError, match=r"x must be \[t, c\], c > 0, .* got \[4\]"):
        quantize_rows(x[:, 0])
    with pytest.raises(ValueError, match=r"weight must be .* got \[48, 64\] torch.float64"):
        fp8_linear(x, w.double())
    with pytest.raises(ValueError, match="must not both be None"):
        fp8_linear(x, None)
    quantized = quantize_weight(w)
    with pytest.raises(ValueError, match=r"w_scale must be \[1, 4\] float32, contiguous, got \[1"):
        fp8_linear(x, None, quantized=quantized._replace(w_scale=torch.ones(1, 1)))
    for bad in (x.double(), x.int(), x[0, 0]):
        with pytest.raises(
            ValueError, match=r"x must be \[..., c\] in bfloat16, float16 or float32"
        ):
            fp8_linear(bad, None, quantized=quantized)
    with pytest.raises(ValueError, match=r"must have one shape, got \[47, 64\] and \[48, 64\]"):
        fp8_linear(x, w[:47], quantized=quantized)
    with pytest.raises(ValueError, match="needs multiples of 16, got c = 64 and o = 47"):
        fp8_linear(x, w[:47], backend="scaled_mm")
    with pytest.raises(BackendUnavailable, match="scaled_mm needs an sm_90 GPU, device is cpu"):
        fp8_linear(x, w, backend="scaled_mm")

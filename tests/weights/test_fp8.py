from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.weights.fp8 import FP8_E4M3_MAX, dequantize_blocks, quantize_blocks, scale_shape


def relative_rms_error(x: torch.Tensor, approximation: torch.Tensor) -> float:
    return float((approximation - x).norm() / x.norm())


@pytest.mark.parametrize("shape", [(256, 256), (130, 70), (1, 300), (3, 129, 257)])
@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 300.0])
def test_gaussian_error_is_that_of_e4m3(shape: tuple[int, ...], magnitude: float) -> None:
    x = torch.randn(shape) * magnitude
    error = relative_rms_error(x, dequantize_blocks(*quantize_blocks(x)))
    assert 0.022 < error < 0.031


def test_block_size_hardly_matters_to_a_floating_format() -> None:
    x = torch.randn(512, 512)
    whole = quantize_blocks(x)
    fine = torch.empty_like(x)
    for row in range(512):  # one scale per 1 x 128
        fine[row] = dequantize_blocks(*quantize_blocks(x[row : row + 1]))[0]
    coarse_error = relative_rms_error(x, dequantize_blocks(*whole))
    assert coarse_error <= 1.02 * relative_rms_error(x, fine)


def naive(x: torch.Tensor) -> torch.Tensor:
    """One block at a time, in double precision."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for r in range(0, x.shape[0], 128):
        for c in range(0, x.shape[1], 128):
            block = x[r : r + 128, c : c + 128].double()
            amax = float(block.abs().max())
            scale = 2.0 ** math.ceil(math.log2(amax / FP8_E4M3_MAX)) if amax else 1.0
            out[r : r + 128, c : c + 128] = (block / scale).to(torch.float8_e4m3fn).double() * scale
    return out


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 200),
    cols=st.integers(1, 200),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_equals_the_naive_loop(rows: int, cols: int, exponent: int, seed: int) -> None:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    assert torch.equal(dequantize_blocks(*quantize_blocks(x)).double(), naive(x))


def test_scale_is_the_smallest_power_of_two_that_fits() -> None:
    amax = torch.tensor([448.0, 448.1, 224.0, 1.0, 0.0, 2.0**-140])
    x_fp8, x_scale = quantize_blocks(amax.view(6, 1, 1))
    assert x_scale.view(torch.uint8).flatten().tolist() == [127, 128, 126, 119, 127, 0]
    assert x_fp8.float().abs().max() <= FP8_E4M3_MAX


def test_blocks_do_not_leak_into_each_other() -> None:
    x = torch.full((129, 129), 1e-3)
    x[128, 128] = 1e30
    back = dequantize_blocks(*quantize_blocks(x))
    torch.testing.assert_close(back, x, rtol=2**-4, atol=0.0)


def test_error_of_each_value_is_at_most_half_a_step() -> None:
    x = torch.randn(128, 128)
    x_fp8, x_scale = quantize_blocks(x)
    scale = float(x_scale.float())
    bound = torch.maximum(x.abs() * 2**-4, torch.tensor(scale * 2**-10))
    assert ((dequantize_blocks(x_fp8, x_scale) - x).abs() <= bound).all()


def test_quantising_twice_changes_nothing() -> None:
    once = dequantize_blocks(*quantize_blocks(torch.randn(200, 140)))
    assert torch.equal(dequantize_blocks(*quantize_blocks(once)), once)


def test_strided_and_bf16_input() -> None:
    x = torch.randn(150, 260, dtype=torch.bfloat16)
    assert torch.equal(quantize_blocks(x.T).x_fp8.float(), quantize_blocks(x).x_fp8.float().T)
    assert dequantize_blocks(*quantize_blocks(x), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_empty_and_scale_shape() -> None:
    x_fp8, x_scale = quantize_blocks(torch.zeros(0, 5))
    assert x_fp8.shape == (0, 5)
    assert x_scale.shape == scale_shape((0, 5)) == (0, 1)
    assert scale_shape((4, 128, 129)) == (4, 1, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused(bad: float) -> None:
    x = torch.zeros(130, 130)
    x[129, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize_blocks(x)


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int64)])
def test_wrong_input_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"float tensor \[\.\.\., o, i\]"):
        quantize_blocks(x)


def test_wrong_scale_shape_is_refused() -> None:
    x_fp8, x_scale = quantize_blocks(torch.randn(129, 4))
    with pytest.raises(ValueError, match=r"x_scale must have shape \[2, 1\], got \[1, 1\]"):
        dequantize_blocks(x_fp8, x_scale[:1])

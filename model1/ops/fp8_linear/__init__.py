"""Linear maps on FP8 matrix units with block scales, forward and backward.

    y = x w^T;   dx = dy w;   dw = dy^T x

Everything is e4m3 with x ~= x_fp8 * x_scale: one scale per 128 numbers along the axis that a
product sums over, for weights one per block of 128 x 128. Sums are fp32. The weight's own numbers
stay in bf16 or fp32, for the optimiser.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.fp8_linear.checks import (
    PRECISIONS,
    SCALE_FORMATS,
    check_choice,
    check_input,
    check_matrix,
    check_quantized,
    check_scaled_mm,
    check_weight,
)
from model1.ops.fp8_linear.choice import choose_backend
from model1.ops.fp8_linear.dispatch import DTYPE_NAMES


class Fp8Weight(NamedTuple):
    """A matrix [o, c] and its transpose in FP8, with one scale per block of 128 x 128."""

    w_fp8: Tensor  # [o, c] float8_e4m3fn
    w_scale: Tensor  # [ceil(o/128), ceil(c/128) up to a multiple of 4] fp32
    w_fp8_t: Tensor  # [c, o], for dx
    w_scale_t: Tensor  # [ceil(c/128), ceil(o/128) up to a multiple of 4]


def quantize_rows(
    x: Tensor, *, scale_format: str = "ue8m0", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x_fp8 [t, c] and x_scale [t, ceil(c/128)] fp32 of x [t, c], groups of 128 along c.

    x_fp8 = e4m3(x * (1 / x_scale)), to nearest. "fp32": x_scale = max|group| times 1/448 in fp32.
    "ue8m0": the smallest power of two that is not under max|group| / 448. Scales are at least
    2^-126, 1 for a group of zeros. A group with NaN or an infinity gets scale NaN and codes 0: all
    of it is NaN. The last group may be shorter. x_scale has the tokens adjacent, as cuBLAS reads
    it. On a GPU "fp32" may give a number in the middle of two codes the other one.

    x: bf16, fp16 or fp32, any strides. Raises ValueError for others, BackendUnavailable for a
    backend that cannot run here and for "auto" on a GPU without FP8 units.
    """
    codes, scale, _, _ = _quantize(x, "rows", scale_format, backend)
    return codes[: x.shape[0]], scale.t()[: x.shape[0]]


def quantize_columns(
    x: Tensor, *, scale_format: str = "ue8m0", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the transpose: codes [c, t] and scales [c, ceil(t/128)] of x [t, c]."""
    _, _, codes, scale = _quantize(x, "both", scale_format, backend)
    return codes[:, : x.shape[0]], scale.t()


def quantize_weight(
    weight: Tensor, *, scale_format: str = "ue8m0", backend: str = "auto"
) -> Fp8Weight:
    """A weight [o, c] in blocks of 128 x 128; scales, errors and the rest as in `quantize_rows`."""
    return Fp8Weight(*_quantize(weight, "blocks", scale_format, backend))


def fp8_linear(
    x: Tensor,
    weight: Tensor | None,
    *,
    quantized: Fp8Weight | None = None,
    scale_format: str = "ue8m0",
    precision: str = "fp8",
    backend: str = "auto",
) -> Tensor:
    """x [..., c] times the transpose of weight [o, c], in the dtype of x.

    quantized: of the same weight, so that it is not quantised again; then weight may be None, where
    it needs no gradient. precision "bf16": no FP8 products at all, but `F.linear` in the dtype of x
    with the weight, if None the dequantised one: the way for GPUs without FP8 units, which are
    refused otherwise (BackendUnavailable). Backend "ref" emulates FP8 anywhere, and is what "auto"
    means on a CPU; scaled_mm is cuBLAS (sm_90, c and o multiples of 16), which "auto" takes where
    both are multiples of 128; triton is for all others.

    Gradients: dy is quantised in groups of 128 along o for dx, and dy and x in groups of 128 tokens
    for dw: of equally many tokens, each one's y and dx depend on its own numbers alone, dw on
    their order. They are those of the unquantised map: rounding has slope 1. dw is in weight's
    dtype. Differentiable once, the same bits every time. No tokens: y is empty, dw zero. Raises
    ValueError for shapes, dtypes and devices that do not fit.
    """
    check_choice("precision", precision, PRECISIONS)
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_input(x)
    if quantized is not None:
        check_quantized(x, quantized)
    if weight is not None:
        check_weight(x, weight, quantized)
    elif quantized is None:
        raise ValueError("weight and quantized must not both be None")
    if precision == "bf16":
        return F.linear(x, _plain_weight(weight, quantized).to(x.dtype))
    o, c = (quantized.w_fp8 if weight is None else weight).shape  # pyright: ignore
    if backend == "scaled_mm":
        check_scaled_mm(c, o)
    name = choose_backend(backend, x.device, c % 128 == 0 and o % 128 == 0)
    quantize, run = torch.ops.model1.fp8_quantize, torch.ops.model1.fp8_linear
    power_of_two = scale_format == "ue8m0"
    if quantized is None:
        quantized = Fp8Weight(*quantize(weight.detach(), "blocks", power_of_two, name))  # pyright: ignore
    keep = torch.is_grad_enabled() and weight is not None and weight.requires_grad
    rows = x.reshape(math.prod(x.shape[:-1]), c)
    out, _, _ = run(rows, weight, *quantized, power_of_two, keep, name)
    return out.view(*x.shape[:-1], o)


def fp8_matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    b_is_blocks: bool, out_dtype: torch.dtype = torch.bfloat16, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """A B^T [m, n] of codes a [m, k] and b [n, k] as `fp8_quantize_ref` lays them, unchecked."""
    fits = a.shape[1] % 128 == 0 and b.shape[0] % 128 == 0
    name = choose_backend(backend, a.device, fits)
    out = DTYPE_NAMES[out_dtype]
    return torch.ops.model1.fp8_matmul(a, a_scale, b, b_scale, b_is_blocks, out, name)


def _quantize(x: Tensor, kind: str, scale_format: str, backend: str) -> tuple[Tensor, ...]:
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_matrix("x" if kind != "blocks" else "weight", x)
    name = choose_backend(backend, x.device, False)
    return torch.ops.model1.fp8_quantize(x.detach(), kind, scale_format == "ue8m0", name)


def _plain_weight(weight: Tensor | None, quantized: Fp8Weight | None) -> Tensor:
    if weight is not None:
        return weight
    assert quantized is not None
    o, c = quantized.w_fp8.shape
    scale = quantized.w_scale.repeat_interleave(128, 0)[:o].repeat_interleave(128, 1)[:, :c]
    return quantized.w_fp8.float() * scale

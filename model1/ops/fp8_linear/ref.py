"""Plain PyTorch block-scaled FP8: quantisation, and products of the dequantised matrices in fp32.

It computes what FP8 units compute, up to the order of fp32 sums, on any device.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
GROUP = 128  # numbers along an axis that share a scale
SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number, so that its inverse is one too

Kind = Literal["rows", "both", "blocks"]
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


def fp8_quantize_ref(x: Tensor, *, kind: str, power_of_two: bool) -> Quantized:
    """codes, scales, codes of the transpose and their scales of a matrix [t, c], contiguous.

    "rows": codes [t16, c] of groups of 128 along c, scales [ceil(c/128), t16]; the others empty.
    "both": and codes [c, t128] of groups along t, scales [t128/128, c].
    "blocks": codes [t, c] and [c, t] of blocks 128 x 128, scales [ceil(t/128), k4] and
    [ceil(c/128), k4], where k4 blocks of the other axis are counted up to a multiple of 4.

    t16, t128: t rounded up; what is added is zeros with scale 1, k4's tail is 1. Scales are what
    `model1.ops.fp8_linear.quantize_rows` says.
    """
    t, c = x.shape
    x = x.detach().float()
    if kind == "blocks":
        blocks = F.pad(x, (0, -c % GROUP, 0, -t % GROUP)).unflatten(0, (-1, GROUP))
        amax = blocks.unflatten(2, (-1, GROUP)).abs().amax(dim=(1, 3))
        scale = _scale(amax, power_of_two)
        per_number = scale.repeat_interleave(GROUP, 0)[:t].repeat_interleave(GROUP, 1)[:, :c]
        codes = _codes(x, per_number)
        return (
            codes,
            _counted_by_4(scale),
            codes.t().clone(memory_format=torch.contiguous_format),
            _counted_by_4(scale.t()),
        )
    codes, scale = _quantize_along_rows(F.pad(x, (0, 0, 0, -t % 16)), power_of_two)
    if kind == "rows":
        return codes, scale, codes.new_empty(0), scale.new_empty(0)
    turned = F.pad(x.t(), (0, -t % GROUP)).contiguous()
    return codes, scale, *_quantize_along_rows(turned, power_of_two)


def fp8_matmul_ref(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    b_is_blocks: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A B^T [m, n] of codes a [m, k] and b [n, k]; scales as `fp8_quantize_ref` returns them.

    a_scale [ceil(k/128), m]; b_scale [ceil(k/128), n], or of blocks [ceil(n/128), k4].
    """
    k = a.shape[1]
    left = a.float() * a_scale.t().repeat_interleave(GROUP, 1)[:, :k]
    blocks = b_scale.repeat_interleave(GROUP, 0)[: b.shape[0]] if b_is_blocks else None
    b_scale = b_scale.t() if blocks is None else blocks
    right = b.float() * b_scale.repeat_interleave(GROUP, 1)[:, :k]
    return (left @ right.t()).to(out_dtype)


def _quantize_along_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    amax = F.pad(x, (0, -c % GROUP)).unflatten(1, (-1, GROUP)).abs().amax(dim=2)
    scale = _scale(amax, power_of_two)
    return _codes(x, scale.repeat_interleave(GROUP, 1)[:, :c]), scale.t().clone(
        memory_format=torch.contiguous_format
    )


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """The factor of groups with these largest magnitudes; NaN where one is not finite."""
    if power_of_two:
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, 0.5 <= mantissa < 1
        # 448 * 2^k = 0.875 * 2^(k + 9)
        k = (exponent - 9 + (mantissa > 0.875)).clamp(-126, 127)
        scale = torch.ldexp(torch.ones_like(amax), k)
    else:
        scale = (amax * (1.0 / FP8_E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale.isnan(), 0.0, x * (1.0 / scale)).to(torch.float8_e4m3fn)


def _counted_by_4(scale: Tensor) -> Tensor:
    out = scale.new_ones(scale.shape[0], -(-scale.shape[1] // 4) * 4)
    out[:, : scale.shape[1]] = scale
    return out

"""The Triton product of two block-scaled FP8 matrices: one group of the grouped product."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.grouped_matmul.portable import Scales, grouped_matmul


def fp8_matmul_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    b_is_blocks: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `model1.ops.fp8_linear.ref.fp8_matmul_ref`."""
    scales = Scales(a_scale, b_scale, b_is_blocks)
    return grouped_matmul(a, b[None], None, out_dtype=out_dtype, scales=scales)

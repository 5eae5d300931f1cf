"""PyTorch's own block-scaled product, which is cuBLAS's on sm_90."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_matmul_scaled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    b_is_blocks: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `fp8_matmul_ref`; k and n must be multiples of 16.

    Scales of groups go in with the rows of their matrix adjacent, strides (1, m), those of blocks
    with k adjacent, strides (1, k4): the transposes of what quantisation writes.
    """
    functional = torch.nn.functional
    groups, blocks = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
    return functional.scaled_mm(
        a, b.t(), a_scale.t(), groups, b_scale.t(), blocks if b_is_blocks else groups,
        output_dtype=out_dtype,
    )  # fmt: skip

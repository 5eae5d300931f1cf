"""Sums over the parts that the programs of a kernel leave, in a fixed order: for gradients of
weights, which every run shall give with the same bits."""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.launch import launch_options
from model1.ops.rounding import round_to


@triton.jit(do_not_specialize=["num_parts", "size"])
def sum_parts_kernel(
    partial_ptr, total_ptr, num_parts, size,
    INTERPRETED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[i] = sum over p of partial[p, i], partial fp32."""
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None]
    sums = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        mask = (part < num_parts) & (at < size)
        sums += tl.load(partial_ptr + part * size + at, mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)[None]
    total = round_to(total, total_ptr.dtype.element_ty, INTERPRETED)
    tl.store(total_ptr + at, total, mask=at < size)


def sum_parts_sizes() -> dict[str, int]:
    """How the sum is cut: not yet measured."""
    return {"BLOCK_P": 64, "BLOCK": 32}


def sum_parts(partial: Tensor, total: Tensor) -> None:
    """Write the sum of partial [parts, ...], contiguous fp32, to total [...] in its dtype.

    The current CUDA device must be theirs.
    """
    size, sizes = total.numel(), sum_parts_sizes()
    kernel: Any = sum_parts_kernel
    kernel[(-(-size // sizes["BLOCK"]),)](
        partial, total, len(partial), size, INTERPRETED=knobs.runtime.interpret, **sizes,
        **launch_options(4, 1),
    )  # fmt: skip

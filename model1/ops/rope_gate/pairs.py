"""Triton device function that turns adjacent channel pairs as `model1.ops.rope` does."""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_pairs(x, cos, sin):
    """x [rows, width] fp32 by angles of the same shape, sin as stored in a `Rotation`."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    swapped = tl.reshape(tl.join(odd, even), (x.shape[0], x.shape[1]))
    return tl.fma(swapped, sin, x * cos)

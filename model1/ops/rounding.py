"""Triton device function: fp32 to a storage dtype, with the same bits on a GPU and interpreted."""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (fp32) in DTYPE, to nearest, ties to even; NaN stays NaN.

    INTERPRETED: `triton.knobs.runtime.interpret`. The interpreter of Triton 3.6 truncates where a
    GPU rounds to bf16, so it gets the rounding in integers.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)

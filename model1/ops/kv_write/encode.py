"""Triton device functions that write the cache's 8-bit numbers on every architecture.

The counterparts of `model1.ops.kv_cache.bits`. All are exact: they give the bytes of
`quantize_tiles_ref`, whatever the rounding of a GPU's division and logarithm.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_byte(x, axis: tl.constexpr):
    """log2(scale) + 127 of each row of x along `axis`; 255 for a row with NaN or an infinity.

    scale = 2^ceil(log2(max(amax|x| / 448, 1e-4))). As 448 = 1.75 * 2^8, the exponent is that of
    amax less 8, and one more where the mantissa of amax exceeds 1.75 (0x600000).
    """
    # the bits of magnitudes are in their order, NaN above all; a maximum of floats may drop NaN
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)
    exponent = ((amax + (0x7FFFFF - 0x600000)) >> 23) - 8
    byte = tl.maximum(exponent, 114)  # 2^-13 is the power of two next above 1e-4
    return tl.where(amax >= 0x7F800000, 255, byte)


@triton.jit
def fp32_to_e4m3(x, NATIVE: tl.constexpr):
    """The e4m3fn bytes (uint8) nearest to x, ties to even; |x| <= 448 or NaN, which gives 0x7F.

    NATIVE: use the conversion instruction, which Triton has for sm_89 and later.
    """
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # three mantissa bits stay; the exponent bias goes from 127 to 7
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 codes are multiples of 2^-9, which is what fp32 rounds to next to 2^14
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code |= (bits >> 24) & 0x80
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)

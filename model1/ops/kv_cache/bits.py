"""Triton device functions that read the cache's 8-bit numbers on every architecture.

Triton refuses e4m3 below sm_89, so codes are loaded as uint8 and placed into fp32 bits. Both
decodes are exact, subnormals, zeros and NaN codes included.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_fp32(code):
    """The fp32 value of e4m3fn bytes (given as uint8); 0x7f and 0xff are NaN."""
    bits = code.to(tl.int32)
    # sign to bit 31, exponent and mantissa to bits 20..26; 2^120 moves the bias from 7 to 127
    placed = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    value = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2.0**120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0_to_fp32(code):
    """2^(code - 127) in fp32 for scale bytes (given as uint8); 255 is NaN."""
    bits = code.to(tl.int32)
    placed = tl.where(bits == 0, 0x00400000, bits << 23)  # 2^-127 is subnormal in fp32
    value = placed.to(tl.float32, bitcast=True)
    return tl.where(bits == 255, float("nan"), value)

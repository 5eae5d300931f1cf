"""Codes and scales of stored rows, and how they are read: plain PyTorch, the gather's oracle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FP8_GROUP = 32  # channels per scale, as in the released 8-bit tables
FP4_GROUP = 8
# Positive half of the levels; the scale of a group is close to its largest magnitude.
FP4_LEVELS = (0.059, 0.1795, 0.306, 0.4395, 0.5795, 0.7176, 0.874, 1.053)
# E5M3: 2^(e - 24) * (1 + m / 8) for byte = 8 e + m, and 0 for byte 0.
E5M3_FP32_BIAS = (127 - 24) << 23


def engram_gather_ref(
    data: Tensor, scale: Tensor | None, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """Oracle of `model1.ops.engram.gather.gather_rows`: [rows, dim]."""
    if scale is None:
        return data.index_select(0, rows).float().to(dtype)
    decode = decode_fp4 if data.dtype == torch.uint8 else decode_fp8
    codes = data.view(torch.uint8).index_select(0, rows)
    return decode(codes, scale.index_select(0, rows)).flatten(1).to(dtype)


def decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 [rows, groups, 32] of e4m3 codes and E8M0 scales, both as uint8."""
    # The bits of an e4m3 code, sign apart, moved into an fp16 read as the value over 2^8,
    # subnormals included; several times faster on a CPU than its fp8 conversion.
    halves = ((codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000).view(torch.float16)
    # The byte is the exponent field of an fp32: byte 0 reads as 0, as in the released tables.
    factors = (scale.int() << 23).view(torch.float32) * 2.0**8
    values = halves.float().view(*scale.shape, FP8_GROUP)
    return values.mul_(factors.unsqueeze(-1))


def decode_fp4(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 [rows, groups, 8] of 4-bit codes and E5M3 scales, both as uint8."""
    # One look-up gives both channels of a byte: the pair of fp32 is fetched as one int64.
    pairs = _fp4_pairs(codes.device).index_select(0, codes.flatten().int())
    values = pairs.view(torch.float32).view(*scale.shape, FP4_GROUP)
    return values.mul_(from_e5m3(scale.int()).unsqueeze(-1))


def from_e5m3(byte: Tensor) -> Tensor:
    """fp32 of int32 bytes."""
    factor = ((byte << 20) + E5M3_FP32_BIAS).view(torch.float32)
    return factor.masked_fill(byte == 0, 0.0)


def fp4_levels(device: torch.device) -> Tensor:
    """[16] fp32, ascending: what the codes stand for under a scale of 1."""
    negative = [-level for level in reversed(FP4_LEVELS)]
    return torch.tensor([*negative, *FP4_LEVELS], dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=16)
def _fp4_pairs(device: torch.device) -> Tensor:
    """[256] int64: the two fp32 levels of each byte, the low nibble's first in memory."""
    levels = fp4_levels(device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1)
    return pairs.contiguous().view(torch.int64).squeeze(1)

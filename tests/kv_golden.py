"""Literal bytes of every KV-cache layout, by the tables of docs/kv_layout.md."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.kv_cache import KVLayout


class GoldenToken(NamedTuple):
    """A token stored at slot 3 of blocks of two tokens, and what its block (the second) holds."""

    layout: KVLayout
    token: Tensor
    block: bytes


def _tiles(values: list[float], width: int) -> Tensor:
    return torch.tensor(values).repeat_interleave(width)


ABOVE = math.nextafter(3.5, 4.0) + 2.0**-22  # 3.5 plus one fp32 ulp
ROPE = torch.tensor([1.0, -0.5, 3.140625, 0.0]).repeat(16)
ROPE_BYTES = bytes.fromhex("803f00bf49400000") * 16

MODEL1 = GoldenToken(
    KVLayout("model1_fp8", 448, 64),
    torch.cat([_tiles([1.0, 0.0, 448.0, -2.0, 3.5, ABOVE, math.nan], 64), ROPE]),
    bytes(576)
    + b"".join(bytes([c]) * 64 for c in (0x78, 0x00, 0x7E, 0xF8, 0x7E, 0x76, 0x7F))
    + ROPE_BYTES
    + bytes(8)
    + bytes([119, 114, 127, 120, 120, 121, 255, 0])
    + bytes(1728 - 1168),
)
V32 = GoldenToken(
    KVLayout("v32_fp8", 512, 64),
    torch.cat([_tiles([1.0, 1e-5, ABOVE, math.inf], 128), ROPE]),
    bytes(656)
    + b"".join(bytes([c]) * 128 for c in (0x78, 0x1A, 0x76, 0x7F))
    # 2^-8, 2^-13, 2^-6, NaN as little-endian fp32
    + bytes.fromhex("0000803b 00000039 0000803c 0000c07f")
    + ROPE_BYTES,
)
BF16 = GoldenToken(
    KVLayout("bf16", 2, 1),
    torch.tensor([1.0, -0.5, 3.140625]),
    bytes(6) + bytes.fromhex("803f 00bf 4940"),
)
FP32 = GoldenToken(
    KVLayout("fp32", 2, 1),
    torch.tensor([1.0, -0.5, 3.140625]),
    bytes(12) + bytes.fromhex("0000803f 000000bf 00004940"),
)
GOLDEN_TOKENS = [MODEL1, V32, BF16, FP32]

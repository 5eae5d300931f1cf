"""Rows of an Engram table as they are stored: bf16, 8 bits or 4 bits per channel.

A store is built once from trained rows and then only read. `gather` touches nothing but the
rows asked for, so a table may be far larger than what one step can afford to read.

kind   bytes per row of `dim`   code                        scale
bf16   2 * dim                  bfloat16                    none
fp8    dim + dim / 32           e4m3                        E8M0, 2^(byte - 127), per 32 channels
fp4    dim / 2 + dim / 8        16 levels, low nibble first E5M3, per 8 channels

The 4-bit levels are those of least squared error for Gaussian channels under such a scale
(found by Lloyd's iteration); with a scale per 8 channels and 3 mantissa bits they lose about
half of what e2m1 codes with a power-of-two scale per 16 lose, at 5/16 of the bytes of bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model1.ops.engram.formats import (
    E5M3_FP32_BIAS,
    FP4_GROUP,
    FP8_GROUP,
    fp4_levels,
    from_e5m3,
)
from model1.ops.engram.gather import gather_rows

RowKind = Literal["bf16", "fp8", "fp4"]

FP8_E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
_E5M3_MIN_BYTE, _E5M3_MAX_BYTE = 1, 255
# Largest magnitude of each kind: the largest bfloat16, what keeps a factor of `decode_fp8`
# finite, and E5M3's byte 255.
_LARGEST = {"bf16": torch.finfo(torch.bfloat16).max, "fp8": 2.0**127, "fp4": 240.0}
_SCALE_SEARCH = (0, -1, 1, -2, 2)  # bytes tried around the one of the largest magnitude
_CHUNK_ROWS = 1 << 14  # bounds the scratch memory of quantisation


@dataclass(frozen=True, eq=False, slots=True)
class RowStore:
    """A quantised table.

    data: [rows, dim] bf16 or float8_e4m3fn, or [rows, dim / 2] uint8 for "fp4"
    scale: [rows, dim / group] uint8, or None for "bf16"
    """

    kind: RowKind
    data: Tensor
    scale: Tensor | None

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.data.shape[0]

    @property
    def dim(self) -> int:
        """Channels of one row."""
        return self.data.shape[1] * (2 if self.kind == "fp4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def gather(
        self, rows: Tensor, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> Tensor:
        """The de-quantised rows: [*rows.shape, dim] in dtype, computed in fp32.

        rows: int64 of any shape, on the store's device. A row outside the table is an IndexError
        on the CPU; kernels read it as NaN, and the reference on a GPU leaves it to PyTorch.
        """
        if rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64, got {rows.dtype}")
        flat = gather_rows(self.data, self.scale, rows.flatten(), dtype=dtype, backend=backend)
        return flat.view(*rows.shape, self.dim)

    def to(self, device: torch.device | str) -> RowStore:
        """The same store on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return RowStore(self.kind, self.data.to(device), scale)

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save under the keys "data" and "scale"; `from_tensors` reads them back."""
        tensors = {"data": self.data}
        return tensors if self.scale is None else {**tensors, "scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RowStore:
        """Inverse of `to_tensors`, without a copy; the kind follows from the dtype of "data".

        Raises ValueError when keys, dtypes or shapes are not those of one kind.
        """
        unknown = sorted(set(tensors) - {"data", "scale"})
        if unknown or "data" not in tensors:
            raise ValueError(f"row store keys must be data and scale, got {sorted(tensors)}")
        data, scale = tensors["data"], tensors.get("scale")
        kinds: dict[torch.dtype, tuple[RowKind, int]] = {
            torch.bfloat16: ("bf16", 0),
            torch.float8_e4m3fn: ("fp8", FP8_GROUP),
            torch.uint8: ("fp4", FP4_GROUP // 2),
        }
        if data.ndim != 2 or data.dtype not in kinds:
            raise ValueError(
                f"row store data must be [rows, columns] of bfloat16, float8_e4m3fn or uint8, "
                f"got {tuple(data.shape)} {data.dtype}"
            )
        kind, columns_per_scale = kinds[data.dtype]
        _check_scale(kind, data, scale, columns_per_scale)
        return cls(kind, data, scale)


def quantize_rows(x: Tensor, kind: RowKind) -> RowStore:
    """Store the rows of x: [rows, dim] floating point, finite.

    dim must be a multiple of 32 for "fp8" and of 8 for "fp4". Scales are per row, so any part of
    a table can be quantised alone. "fp4" reads 8 channels that are all below 6e-8 as zeros. Raises
    ValueError for another kind, a dim that does not fit, a value that is not finite, or a
    magnitude above 240 for "fp4" and 2^127 for "fp8".
    """
    groups = {"bf16": 1, "fp8": FP8_GROUP, "fp4": FP4_GROUP}
    if kind not in groups:
        raise ValueError(f"kind must be one of {list(groups)}, got {kind!r}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be [rows, dim] floating point, got {tuple(x.shape)} {x.dtype}")
    dim = x.shape[1]
    if dim == 0 or dim % groups[kind] != 0:
        raise ValueError(f"dim must be a positive multiple of {groups[kind]} for {kind}, got {dim}")
    encode = {"bf16": _encode_bf16, "fp8": _encode_fp8, "fp4": _encode_fp4}[kind]
    # One chunk even when there are no rows, so that the empty store has its dtypes and shapes.
    parts = [encode(_in_range(chunk.detach().float(), kind)) for chunk in x.split(_CHUNK_ROWS)]
    data = torch.cat([codes.view(torch.uint8) for codes, _ in parts])
    data = data.view(parts[0][0].dtype)
    scales = [scale for _, scale in parts if scale is not None]
    return RowStore(kind, data, torch.cat(scales) if scales else None)


def _check_scale(kind: RowKind, data: Tensor, scale: Tensor | None, columns: int) -> None:
    if kind == "bf16":
        if scale is not None:
            raise ValueError("a bf16 row store must have no scale")
        return
    if data.shape[1] == 0 or data.shape[1] % columns != 0:
        raise ValueError(
            f"{kind} row store data must have a positive multiple of {columns} columns, "
            f"got {data.shape[1]}"
        )
    shape = (data.shape[0], data.shape[1] // columns)
    if scale is None or tuple(scale.shape) != shape or scale.dtype != torch.uint8:
        found = "none" if scale is None else f"{tuple(scale.shape)} {scale.dtype}"
        raise ValueError(f"{kind} row store scale must be {shape} uint8, got {found}")


def _in_range(x: Tensor, kind: RowKind) -> Tensor:
    largest = x.abs().max().item() if x.numel() else 0.0
    if not largest <= _LARGEST[kind]:  # also true of NaN
        raise ValueError(f"{kind} rows must be within +-{_LARGEST[kind]:g}, got {largest:g}")
    return x


def _encode_bf16(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return x.to(torch.bfloat16), None


def _encode_fp8(x: Tensor) -> tuple[Tensor, Tensor | None]:
    grouped = x.unflatten(1, (-1, FP8_GROUP))
    # Smallest power of two that brings the group within e4m3: exact, no logarithm.
    mantissa, exponent = torch.frexp(grouped.abs().amax(-1) / FP8_E4M3_MAX)
    byte = (exponent.int() - (mantissa == 0.5).int() + 127).clamp(1, 254)
    scaled = grouped / (byte << 23).view(torch.float32).unsqueeze(-1)
    codes = scaled.clamp(-FP8_E4M3_MAX, FP8_E4M3_MAX).flatten(1).to(torch.float8_e4m3fn)
    return codes, byte.to(torch.uint8)


def _encode_fp4(x: Tensor) -> tuple[Tensor, Tensor | None]:
    grouped = x.unflatten(1, (-1, FP4_GROUP))
    largest = grouped.abs().amax(-1, keepdim=True)
    levels = fp4_levels(x.device)
    borders = (levels[1:] + levels[:-1]) / 2
    start = _to_e5m3(largest)
    byte, codes, error = start, start, torch.full_like(largest, torch.inf)
    for step in _SCALE_SEARCH:
        trial_byte = (start + step).clamp(_E5M3_MIN_BYTE, _E5M3_MAX_BYTE)
        factor = from_e5m3(trial_byte)
        trial_codes = torch.bucketize(grouped / factor, borders)
        trial_error = (levels[trial_codes] * factor - grouped).square().sum(-1, keepdim=True)
        better = trial_error < error
        byte = torch.where(better, trial_byte, byte)
        codes = torch.where(better, trial_codes, codes)
        error = torch.where(better, trial_error, error)
    byte = torch.where(start == 0, start, byte)  # too small for any scale: the group reads as 0
    low, high = codes.flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).to(torch.uint8), byte.squeeze(-1).to(torch.uint8)


def _to_e5m3(x: Tensor) -> Tensor:
    """Nearest byte (int32) for x >= 0; 0 where x is below half of the smallest scale."""
    rounded = (x.view(torch.int32) + (1 << 19)) >> 20
    return (rounded - (E5M3_FP32_BIAS >> 20)).clamp(0, _E5M3_MAX_BYTE)

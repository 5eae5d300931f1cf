"""How each tensor of a model is stored, and the way there and back.

One table decides by name, one rule by shape. What a file must hold follows from names, shapes and
the `quantization` object of config.json alone, so a reader checks every dtype before using it.

A tensor `x` stored in FP8, or a table stored in FP8 or 4 bits, is two entries of the file:
`x` and `x_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model1.errors import CheckpointError, ConfigError
from model1.ops.engram.rows import RowStore, quantize_rows
from model1.strict import build_dataclass
from model1.weights.fp8 import BLOCK, dequantize_blocks, quantize_blocks
from model1.weights.tensors import Shards

WeightFormat = Literal["fp8", "bf16", "fp32"]
TableFormat = Literal["fp32", "bf16", "fp8", "fp4"]
Storage = Literal["fp8", "bf16", "fp32", "table"]

SCALE_SUFFIX = "_scale"
MIN_MATRIX_SIDE = 64  # narrower matrices save too little to be worth their error
KEEP_FP32_BYTES = 64 * 1024  # tensors that are not matrices stay fp32 up to this size

_CHUNK_ROWS = 1 << 16  # bounds the scratch memory of decoding a whole table
_INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)
_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    storage: Literal["table", "keep"]
    reason: str


# First match wins; a name that matches none is decided by its shape.
STORAGE_RULES = (
    _Rule(re.compile(r"\.engram\.table\.weight$"), "table", "read by row; bulk of the bytes"),
    _Rule(re.compile(r"mhc"), "keep", "feeds Sinkhorn, which exponentiates its errors"),
    _Rule(re.compile(r"norm"), "keep", "scales whole channels; a few kB"),
    _Rule(re.compile(r"(bias|sink)$"), "keep", "added to logits; a few kB"),
    _Rule(re.compile(r"\bgate(\.proj)?\.weight$"), "keep", "small; its order decides the experts"),
    _Rule(re.compile(r"selector\.basis$"), "keep", "orthonormal; its order decides the core"),
)


def tensor_kind(name: str, shape: torch.Size) -> Literal["table", "matrix", "keep"]:
    """What a float tensor is to storage: Engram rows, a matrix (or stack), or kept as it is."""
    for rule in STORAGE_RULES:
        if rule.pattern.search(name):
            return rule.storage
    return "matrix" if len(shape) >= 2 and min(shape[-2:]) >= MIN_MATRIX_SIDE else "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageFormats:
    """The `quantization` object of config.json."""

    weights: WeightFormat
    tables: TableFormat
    weight_block_size: tuple[int, ...] = (BLOCK, BLOCK)
    scale_fmt: Literal["ue8m0"] = "ue8m0"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weights", self.weights, ("fp8", "bf16", "fp32")),
            ("tables", self.tables, ("fp32", "bf16", "fp8", "fp4")),
            ("weight_block_size", self.weight_block_size, ((BLOCK, BLOCK),)),
        ):
            if value not in known:
                raise ConfigError(f"quantization.{name} must be one of {known}, got {value!r}")

    @classmethod
    def from_dict(cls, data: Any) -> StorageFormats:
        """Strict: an unknown, missing or wrong key is a ConfigError. None: fp32, as in training."""
        if data is None:
            return cls(weights="fp32", tables="fp32")
        if not isinstance(data, dict):
            raise ConfigError(f"quantization must be an object, got {data!r}")
        return build_dataclass(cls, data, where="quantization.")

    def storage(self, name: str, shape: torch.Size) -> Storage:
        """How the float tensor `name` of this shape is stored."""
        kind = tensor_kind(name, shape)
        if kind == "table":
            return "table"
        if kind == "matrix":
            return self.weights
        if self.weights == "fp32" or shape.numel() * 4 <= KEEP_FP32_BYTES:
            return "fp32"
        return "bf16"


class StoredState(NamedTuple):
    """A decoded checkpoint."""

    tensors: dict[str, Tensor]  # fp32 or bf16 as stored, FP8 as fp32, integers as stored
    tables: dict[str, RowStore]


def encode_state(state: Mapping[str, Tensor], formats: StorageFormats) -> dict[str, Tensor]:
    """The file entries for `state`, on the CPU.

    Raises CheckpointError naming the tensor for NaN or infinity and for a table whose rows do not
    fit the table format.
    """
    entries: dict[str, Tensor] = {}
    for name, tensor in state.items():
        try:
            entries.update(_encode(name, tensor.detach().cpu(), formats))
        except ValueError as error:
            raise CheckpointError(f"cannot store tensor {name}: {error}") from error
    return entries


def decode_state(shards: Shards, formats: StorageFormats) -> StoredState:
    """Inverse of `encode_state`.

    Raises CheckpointError naming file and tensor when a dtype is not the one that `formats` asks
    for, or when a scale is missing or does not fit.
    """
    entries = shards.tensors
    scales = {name + SCALE_SUFFIX for name in entries} & set(entries)
    state = StoredState({}, {})
    for name, entry in entries.items():
        if name in scales:
            continue
        scale = entries.get(name + SCALE_SUFFIX)
        try:
            decoded = _decode(name, entry, scale, formats)
        except ValueError as error:
            raise CheckpointError(f"{shards.files[name]}: tensor {name}: {error}") from error
        if isinstance(decoded, RowStore):
            state.tables[name] = decoded
        else:
            state.tensors[name] = decoded
    return state


def dequantize_rows(store: RowStore) -> Tensor:
    """All rows of a table, [num_rows, dim] fp32, decoded chunk by chunk."""
    out = torch.empty(store.num_rows, store.dim, device=store.data.device)
    for rows in torch.arange(store.num_rows, device=out.device).split(_CHUNK_ROWS):
        out[rows] = store.gather(rows)
    return out


def _encode(name: str, tensor: Tensor, formats: StorageFormats) -> dict[str, Tensor]:
    if not tensor.is_floating_point():
        return {name: tensor}
    if not torch.isfinite(tensor).all():
        raise ValueError("it must be finite, it holds NaN or infinity")
    storage = formats.storage(name, tensor.shape)
    if storage == "table" and formats.tables != "fp32":
        rows = quantize_rows(tensor, formats.tables).to_tensors()
        keys = {"data": name, "scale": name + SCALE_SUFFIX}
        return {keys[part]: values for part, values in rows.items()}
    if storage == "fp8":
        blocks = quantize_blocks(tensor)
        return {name: blocks.x_fp8, name + SCALE_SUFFIX: blocks.x_scale}
    return {name: tensor.to(torch.float32 if storage == "table" else _DTYPES[storage])}


def _decode(
    name: str, entry: Tensor, scale: Tensor | None, formats: StorageFormats
) -> Tensor | RowStore:
    storage = formats.storage(name, entry.shape)
    if storage == "table" and formats.tables == "fp32":
        if entry.dtype != torch.float32 or scale is not None:
            raise ValueError(f"rows must be stored as fp32 without a scale, got {entry.dtype}")
        return quantize_rows(entry, "bf16")  # the widest that is looked up
    if storage == "table":
        store = RowStore.from_tensors(
            {"data": entry} if scale is None else {"data": entry, "scale": scale}
        )
        if store.kind != formats.tables:
            raise ValueError(f"rows must be stored as {formats.tables}, got {store.kind}")
        return store
    if entry.dtype in _INTEGER_DTYPES:
        return entry
    if entry.dtype != _DTYPES[storage]:
        raise ValueError(f"it must be stored as {_DTYPES[storage]}, got {entry.dtype}")
    if storage != "fp8":
        if scale is not None:
            raise ValueError(f"it is stored as {entry.dtype} and must have no scale")
        return entry
    if scale is None or scale.dtype != torch.float8_e8m0fnu:
        found = "none" if scale is None else str(scale.dtype)
        raise ValueError(f"it needs scales in float8_e8m0fnu, got {found}")
    return dequantize_blocks(entry, scale)

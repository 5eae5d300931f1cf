from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from model1.errors import CheckpointError, ConfigError
from model1.ops.engram.rows import RowStore
from model1.weights.formats import (
    StorageFormats,
    StoredState,
    TableFormat,
    WeightFormat,
    decode_state,
    dequantize_rows,
    encode_state,
    tensor_kind,
)
from model1.weights.tensors import Shards

TABLE = "layers.1.engram.table.weight"
MATRIX = "layers.0.ffn.w1.weight"
# Largest RMS error relative to a Gaussian tensor.
ERROR = {"fp32": 0.0, "bf16": 0.002, "fp8": 0.029, "fp4": 0.08}


def formats(weights: WeightFormat = "fp8", tables: TableFormat = "fp8") -> StorageFormats:
    return StorageFormats(weights=weights, tables=tables)


def state() -> dict[str, torch.Tensor]:
    return {
        MATRIX: torch.randn(130, 200),
        "layers.0.ffn.gate_up": torch.randn(3, 130, 64),
        TABLE: torch.randn(300, 32) * 0.02,
        "layers.0.mhc_attn.fn": torch.randn(24, 900),
        "layers.0.mhc_ffn.fn": torch.randn(24, 64),
        "layers.0.attn.attn_sink": torch.randn(4),
        "norm.weight": torch.randn(64),
        "counts": torch.arange(5),
    }


def shards(entries: dict[str, torch.Tensor]) -> Shards:
    return Shards(entries, dict.fromkeys(entries, Path("model.safetensors")))


def decode(entries: dict[str, torch.Tensor], how: StorageFormats) -> StoredState:
    return decode_state(shards(entries), how)


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y.float()).norm() / x.norm())


@pytest.mark.parametrize("weights", get_args(WeightFormat))
@pytest.mark.parametrize("tables", get_args(TableFormat))
def test_round_trip_error_of_each_tensor(weights: WeightFormat, tables: TableFormat) -> None:
    original, how = state(), formats(weights, tables)
    decoded = decode(encode_state(original, how), how)
    assert set(decoded.tables) == {TABLE}
    assert set(decoded.tensors) == set(original) - {TABLE}
    large = "fp32" if weights == "fp32" else "bf16"
    limits = dict.fromkeys(original, 0.0) | {
        MATRIX: ERROR[weights],
        "layers.0.ffn.gate_up": ERROR[weights],
        "layers.0.mhc_attn.fn": ERROR[large],  # 86 kB
    }
    for name, tensor in decoded.tensors.items():
        assert tensor.shape == original[name].shape
        assert error(original[name].float(), tensor) <= limits[name], name
    kind = "bf16" if tables == "fp32" else tables  # fp32 rows are looked up in bf16
    assert decoded.tables[TABLE].kind == kind
    assert error(original[TABLE], dequantize_rows(decoded.tables[TABLE])) <= ERROR[kind]


def test_bytes_on_disk() -> None:
    entries = encode_state(state(), formats("fp8", "fp4"))
    assert entries[MATRIX].nbytes == 130 * 200
    assert entries[MATRIX + "_scale"].shape == (2, 2)
    assert entries["layers.0.ffn.gate_up_scale"].shape == (3, 2, 1)
    assert sum(entries[TABLE + end].nbytes for end in ("", "_scale")) <= 300 * 32 * 2 / 3


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("embed.weight", (8192, 384), "matrix"),
        ("head.weight", (8192, 384), "matrix"),
        ("layers.0.attn.wo_a", (2, 128, 576), "matrix"),
        ("layers.0.attn.wq_a.weight", (32, 64), "keep"),
        ("layers.3.engram.table.weight", (80_000, 32), "table"),
        ("layers.3.engram.wkv.weight", (1920, 256), "matrix"),
        ("layers.0.mhc_attn.fn", (80, 1536), "keep"),
        ("mhc_head.fn", (64, 1536), "keep"),
        ("layers.0.ffn.gate.weight", (64, 384), "keep"),
        ("layers.0.ffn.gate_up", (64, 1024, 384), "matrix"),
        ("layers.0.ffn.balance_bias", (64,), "keep"),
        ("layers.0.attn.gate.proj.weight", (128, 4096), "keep"),
        ("layers.0.attn.selector.basis", (64, 448), "keep"),
        ("layers.1.engram.norm_weight", (64, 384), "keep"),
        ("layers.1.engram.conv_weight", (1536, 4), "keep"),
    ],
)
def test_rules(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert tensor_kind(name, torch.Size(shape)) == kind


@pytest.mark.parametrize("name", [MATRIX, TABLE, "norm.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_names_the_tensor(name: str, bad: float) -> None:
    broken = state()
    broken[name].view(-1)[7] = bad
    with pytest.raises(CheckpointError, match=rf"cannot store tensor {name}: .*finite"):
        encode_state(broken, formats())


def test_table_that_does_not_fit_its_format() -> None:
    with pytest.raises(CheckpointError, match=f"tensor {TABLE}: dim must be a positive multiple"):
        encode_state({TABLE: torch.zeros(4, 24)}, formats())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (MATRIX, torch.float32),
        (MATRIX, torch.float8_e5m2),
        ("norm.weight", torch.float16),
        ("norm.weight", torch.bfloat16),
        ("layers.0.mhc_attn.fn", torch.float32),
        (TABLE, torch.bfloat16),
        (TABLE, torch.float32),
    ],
)
def test_swapped_dtype_names_file_and_tensor(name: str, dtype: torch.dtype) -> None:
    entries = encode_state(state(), formats())
    entries[name] = entries[name].float().to(dtype)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name}: .*"):
        decode(entries, formats())


def test_other_table_format_than_promised() -> None:
    entries = encode_state(state(), formats(tables="bf16"))
    with pytest.raises(CheckpointError, match=f"{TABLE}: rows must be stored as fp8, got bf16"):
        decode(entries, formats(tables="fp8"))


@pytest.mark.parametrize("name", [MATRIX, TABLE])
def test_scale_missing_or_wrong(name: str) -> None:
    entries = encode_state(state(), formats())
    scale = entries.pop(name + "_scale")
    with pytest.raises(CheckpointError, match=f"tensor {name}: .*none"):
        decode(entries, formats())
    for wrong in (scale[:1], scale.view(torch.int8)):
        with pytest.raises(CheckpointError, match=f"tensor {name}: "):
            decode({**entries, name + "_scale": wrong}, formats())


def test_scale_without_use() -> None:
    entries = encode_state(state(), formats()) | {"norm.weight_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"norm\.weight: .* must have no scale"):
        decode(entries, formats())


def test_dequantize_rows_reads_all_rows_of_a_large_table() -> None:
    data = torch.arange(150_001 * 2).remainder(251).view(-1, 2).to(torch.bfloat16)
    assert torch.equal(dequantize_rows(RowStore("bf16", data, None)), data.float())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"quantization must be an object, got \[\]"),
        ({"weights": "fp8"}, "missing config key quantization.tables"),
        ({"weights": "int4", "tables": "fp8"}, "quantization.weights must be one of"),
        ({"weights": "fp8", "tables": "fp8", "block": 1}, "unknown config key quantization.block"),
        (
            {"weights": "fp8", "tables": "fp8", "weight_block_size": [64, 64]},
            "quantization.weight_block_size must be one of",
        ),
        (
            {"weights": "fp8", "tables": "fp8", "scale_fmt": "float32"},
            "quantization.scale_fmt must be one of",
        ),
    ],
)
def test_quantization_object_is_strict(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StorageFormats.from_dict(data)

"""Sizes, strides and rules of the KV-cache layouts."""

from __future__ import annotations

import pytest

from model1.errors import ConfigError
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, kv_layout

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)


@pytest.mark.parametrize(
    ("block_size", "used", "stride", "scale_plane"),
    [
        (1, 584, 1152, 576),
        (2, 1168, 1728, 1152),
        (53, 30952, 31104, 30528),
        (61, 35624, 35712, 35136),
        (64, 37376, 37440, 36864),
        (69, 40296, 40320, 39744),
        (256, 149504, 149760, 147456),
        (576, 336384, 336384, 331776),
    ],
)
def test_model1_block_stride(block_size: int, used: int, stride: int, scale_plane: int) -> None:
    assert MODEL1.block_bytes(block_size) == used
    assert MODEL1.block_stride_bytes(block_size) == stride
    assert MODEL1.scale_plane_start_bytes(block_size) == scale_plane


@pytest.mark.parametrize(
    ("layout", "bytes_per_token", "stride"),
    [
        (MODEL1, 584, 1728),
        (V32, 656, 1312),
        (KVLayout("model1_fp8", 64, 64), 200, 576),
        (KVLayout("model1_fp8", 192, 64), 328, 960),
        (KVLayout("v32_fp8", 128, 32), 208, 416),
        (KVLayout("bf16", 192, 64), 512, 1024),
        (KVLayout("fp32", 192, 64), 1024, 2048),
    ],
    ids=str,
)
def test_sizes(layout: KVLayout, bytes_per_token: int, stride: int) -> None:
    assert layout.bytes_per_token == bytes_per_token
    assert allocate_kv_cache(3, 2, layout, "cpu").shape == (3, stride)


def test_kv_layout_picks_by_kind_and_form() -> None:
    assert kv_layout("fp8", "model1", 448, 64) == MODEL1
    assert kv_layout("fp8", "v32", 512, 64) == V32
    assert kv_layout("bf16", "v32", 512, 64) == KVLayout("bf16", 512, 64)
    assert kv_layout("fp32", "model1", 3, 0).d == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp4", "model1", 64, 64), "kind must be 'fp8', 'bf16' or 'fp32', got 'fp4'"),
        (("fp8", "mla", 64, 64), "form must be 'model1' or 'v32', got 'mla'"),
        (("fp8", "model1", 96, 64), "d_nope must be a multiple of 64 for model1_fp8, got 96"),
        (("fp8", "v32", 64, 64), "d_nope must be a multiple of 128 for v32_fp8, got 64"),
        (("fp8", "v32", 448, 64), "d_nope must be a multiple of 128 for v32_fp8, got 448"),
        (("fp8", "model1", 1088, 64), "d_nope must be at most 1024 for model1_fp8, got 1088"),
        (("fp8", "v32", 128, 20), "d_rope must be a multiple of 8 for v32_fp8, got 20"),
        (("bf16", "model1", 0, 64), "d_nope must be positive, got 0"),
        (("fp32", "model1", 64, -2), "d_rope must not be negative, got -2"),
    ],
)
def test_bad_layouts_name_value_and_rule(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kv_layout(*arguments)


def test_unknown_layout_name() -> None:
    with pytest.raises(ConfigError, match=r"name must be one of .*, got 'int8'"):
        KVLayout("int8", 64, 64)  # pyright: ignore[reportArgumentType]

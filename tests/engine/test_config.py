from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from model1.config import ModelConfig
from model1.engine.config import GIB, EngineConfig, fit_num_blocks, resolve
from model1.errors import ConfigError, DeviceError


def model_config(form: str = "model1", nope: int = 448) -> ModelConfig:
    attention = SimpleNamespace(form=form, latent_nope_dim=nope, qk_rope_head_dim=64)
    return cast(Any, SimpleNamespace(max_position_embeddings=4096, attention=attention))


def test_autos_on_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = resolve(EngineConfig(), model_config(), has_cuda=False)
    assert config == EngineConfig(
        device="cpu",
        dtype="int8",
        kv_cache_dtype="fp32",
        max_model_len=4096,
        max_num_batched_tokens=2048,
    )
    assert [record.message.count("dtype=int8") for record in caplog.records] == [1]


def test_autos_on_cuda() -> None:
    config = resolve(EngineConfig(max_model_len=100), model_config(), has_cuda=True)
    assert (config.device, config.dtype, config.kv_cache_dtype) == ("cuda", "bf16", "fp8")
    assert (config.max_model_len, config.max_num_batched_tokens) == (100, 8192)


@pytest.mark.parametrize(
    ("form", "nope", "kind"),
    [("model1", 64, "fp8"), ("model1", 32, "bf16"), ("v32", 512, "fp8"), ("v32", 64, "bf16")],
)
def test_auto_takes_fp8_only_where_whole_tiles_fit(form: str, nope: int, kind: str) -> None:
    assert resolve(EngineConfig(), model_config(form, nope), has_cuda=True).kv_cache_dtype == kind


def test_a_resolved_config_comes_back_unchanged_and_unlogged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = resolve(EngineConfig(), model_config(), has_cuda=False)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert resolve(config, model_config(), has_cuda=True) == config
    assert not caplog.records


def test_explicit_values_are_kept() -> None:
    asked = EngineConfig(
        device="cpu",
        dtype="bf16",
        kv_cache_dtype="fp8",
        max_model_len=64,
        max_num_batched_tokens=32,
        num_blocks=3,
    )
    assert resolve(asked, model_config(), has_cuda=True) == asked


def test_cuda_asked_for_and_absent_is_an_error() -> None:
    with pytest.raises(DeviceError, match="cuda"):
        resolve(EngineConfig(device="cuda"), model_config(), has_cuda=False)


def test_max_model_len_beyond_the_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="4096 positions, got 4097"):
        resolve(EngineConfig(max_model_len=4097), model_config(), has_cuda=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "tpu"),
        ("dtype", "fp16"),
        ("kv_cache_dtype", "int8"),
        ("max_model_len", 1),
        ("max_num_seqs", 0),
        ("block_size", -64),
        ("num_blocks", 0),
        ("max_num_batched_tokens", 15),  # below max_num_seqs
        ("kv_cache_memory_bytes", 0.5),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", float("nan")),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})


def test_num_blocks_is_what_is_needed_within_the_budget() -> None:
    config = EngineConfig(max_model_len=100, max_num_seqs=4, block_size=64)
    assert fit_num_blocks(config, bytes_per_token=10, budget_bytes=GIB) == 8
    assert fit_num_blocks(config, bytes_per_token=10, budget_bytes=640 * 3 + 1) == 3
    explicit = dataclasses.replace(config, num_blocks=50)
    assert fit_num_blocks(explicit, bytes_per_token=10, budget_bytes=1) == 50
    with pytest.raises(DeviceError, match="640 bytes, only 639"):
        fit_num_blocks(config, bytes_per_token=10, budget_bytes=639)

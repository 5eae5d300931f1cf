"""How the engine runs: devices, limits and the size of the cache. Nothing about models or ports.

`resolve` replaces every "auto" and None that needs no measurement, once, and logs the difference;
`backend` stays, as each operator has its own answer to "auto".
The number of cache blocks is measured, so it is a function of the resolved config and the memory
found (`fit_num_blocks`), not something written back into the config.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from model1.config import ModelConfig
from model1.errors import ConfigError, DeviceError
from model1.ops.kv_cache.layout import kv_layout

logger = logging.getLogger(__name__)

GIB = 1 << 30
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16", "int8"),
    "kv_cache_dtype": ("auto", "fp32", "bf16", "fp8"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Engine options. "auto" and None are filled by `resolve`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    kv_cache_dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    backend: str = "auto"  # of the attention operators: "auto", "ref", "triton" or a plug-in
    max_model_len: int | None = None  # prompt plus generated tokens of one request
    max_num_seqs: int = 16  # requests in one step
    max_num_batched_tokens: int | None = None  # tokens in one step
    block_size: int = 64  # tokens per cache block
    num_blocks: int | None = None  # None = what is needed, within the memory limits below
    kv_cache_memory_bytes: int = 2 * GIB  # limit on cpu
    gpu_memory_utilization: float = 0.9  # limit on cuda: share of the memory free at start

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} must be one of {list(choices)}, got {value!r}")
        for name in ("max_num_seqs", "block_size", "kv_cache_memory_bytes"):
            _check_positive(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "num_blocks"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.max_model_len == 1:
            raise ConfigError("max_model_len must be at least 2 (prompt and one token), got 1")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        tokens = self.max_num_batched_tokens
        if tokens is not None and tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_num_seqs {self.max_num_seqs}, "
                f"so that every running request can decode in each step, got {tokens}"
            )


def resolve_placement(config: EngineConfig, *, has_cuda: bool | None = None) -> EngineConfig:
    """The config with device and dtype filled in: what is needed to load a model.

    `has_cuda` None asks PyTorch. Raises DeviceError when cuda is asked for and absent.
    """
    has_cuda = torch.cuda.is_available() if has_cuda is None else has_cuda
    if config.device == "cuda" and not has_cuda:
        raise DeviceError("device 'cuda' was asked for, but PyTorch finds no CUDA device")
    device = ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device
    dtype = ("bf16" if device == "cuda" else "int8") if config.dtype == "auto" else config.dtype
    if dtype == "int8" and device != "cpu":
        raise ConfigError(f"dtype int8 needs device cpu, got {device}")
    return dataclasses.replace(config, device=device, dtype=dtype)


def resolve(
    config: EngineConfig, model_config: ModelConfig, *, has_cuda: bool | None = None
) -> EngineConfig:
    """The config with every "auto" and None filled in; logs what it filled.

    Left are `num_blocks`, to be measured, and `backend`, which each operator resolves.

    Raises as `resolve_placement`, and ConfigError when max_model_len exceeds the model's positions.
    A resolved config comes back unchanged.
    """
    placed = resolve_placement(config, has_cuda=has_cuda)
    is_cuda = placed.device == "cuda"
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most the model's {limit} positions, "
            f"got {config.max_model_len}"
        )
    default_tokens = max(8192 if is_cuda else 2048, config.max_num_seqs)
    resolved = dataclasses.replace(
        placed,
        kv_cache_dtype=_resolve_kv_dtype(config, model_config, is_cuda),
        max_model_len=config.max_model_len or limit,
        max_num_batched_tokens=config.max_num_batched_tokens or default_tokens,
    )
    names = [f.name for f in dataclasses.fields(config)]
    changed = [n for n in names if getattr(resolved, n) != getattr(config, n)]
    if changed:
        shown = ", ".join(f"{n}={getattr(resolved, n)}" for n in changed)
        logger.info("engine config resolved: %s", shown)
    return resolved


def fit_num_blocks(config: EngineConfig, *, bytes_per_token: int, budget_bytes: int) -> int:
    """Cache blocks for max_num_seqs requests of max_model_len, as far as the budget allows.

    An explicit `num_blocks` is taken as it is. Raises DeviceError if not one block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if config.max_model_len is None:
        raise AssertionError("fit_num_blocks needs a resolved config")
    wanted = config.max_num_seqs * blocks_for(config.max_model_len, config.block_size)
    affordable = budget_bytes // (bytes_per_token * config.block_size)
    if affordable < 1:
        raise DeviceError(
            f"a cache block of {config.block_size} tokens needs "
            f"{bytes_per_token * config.block_size} bytes, only {budget_bytes} are available"
        )
    return min(wanted, affordable)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def _resolve_kv_dtype(
    config: EngineConfig, model_config: ModelConfig, is_cuda: bool
) -> Literal["fp32", "bf16", "fp8"]:
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    if not is_cuda:
        return "fp32"
    # The FP8 layouts hold whole tiles only; small models may have narrower latents.
    latent = model_config.attention
    try:
        kv_layout("fp8", latent.form, latent.latent_nope_dim, latent.qk_rope_head_dim)
    except ConfigError:
        return "bf16"
    return "fp8"


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")

"""The sizes of the MHA prefill kernels for each kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import KernelTarget

Kernel = Literal["fwd", "dq", "dkdv"]


@dataclass(frozen=True, slots=True)
class Config:
    """The sizes of one kernel."""

    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    channels: int = 64  # of the widest piece: wider accumulators do not stay in registers


_CHANNELS = (128, 192, 256, 576)  # the widest head of each column
# Hopper's first two columns are measured on an H200, 2026-11-22 (docs/log.md), with what does not
# spill; the others are chosen from registers, spills and shared memory of compiled kernels.
_CONFIGS: dict[str, dict[Kernel, tuple[Config, ...]]] = {
    "hopper": {
        "fwd": (
            Config(128, 128, 8, 3, 128), Config(128, 64, 8, 3, 128), Config(128, 64, 8, 2, 128),
            Config(64, 32, 8, 2, 128),
        ),
        "dq": (
            Config(128, 64, 8, 3, 128), Config(128, 64, 8, 3, 128), Config(64, 64, 8, 2),
            Config(32, 32, 8, 3, 128),
        ),
        "dkdv": (
            Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 32, 8, 3),
            Config(32, 16, 8, 3, 128),
        ),
    },
    "large": {
        "fwd": (
            Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 16, 8, 2),
            Config(32, 32, 8, 2, 128),
        ),
        "dq": (
            Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2),
            Config(32, 32, 8, 2, 128),
        ),
        "dkdv": (
            Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2),
            Config(32, 16, 8, 2, 128),
        ),
    },
    "small": {
        "fwd": (
            Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 16, 8, 2),
            Config(32, 16, 8, 2, 128),
        ),
        "dq": (
            Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2),
            Config(16, 16, 8, 2, 128),
        ),
        "dkdv": (
            Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2),
            Config(16, 16, 8, 2, 128),
        ),
    },
    "amd": {
        "fwd": (
            Config(128, 64, 8, 1), Config(128, 64, 8, 1), Config(64, 16, 4, 1),
            Config(16, 32, 4, 1, 128),
        ),
        "dq": (
            Config(64, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 32, 4, 1),
            Config(16, 16, 4, 1, 128),
        ),
        "dkdv": (
            Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 4, 1),
            Config(16, 16, 4, 1, 128),
        ),
    },
}  # fmt: skip
_FP32 = Config(16, 16, 4, 1)


def choose_config(kernel: Kernel, target: KernelTarget, d: int, dtype: torch.dtype) -> Config:
    """The sizes for heads of at most d channels; BackendUnavailable if the GPU cannot hold them."""
    kind = _kind(target)
    most = 256 if kind in ("small", "amd") and dtype == torch.float32 else _CHANNELS[-1]
    if d > most:
        raise BackendUnavailable(f"mha_prefill/triton takes {most} channels of {dtype}, got {d}")
    if dtype == torch.float32:
        return _FP32
    column = next(i for i, widest in enumerate(_CHANNELS) if d <= widest)
    return _CONFIGS[kind][kernel][column]


def _kind(target: KernelTarget) -> str:
    if target.kind == "hip":
        return "amd"
    if target.arch == 90:
        return "hopper"
    # 163 KB of shared memory per block or more; all others have 99
    return "large" if target.arch in (80, 100) else "small"

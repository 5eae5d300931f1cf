"""Checkpoints of a running training: safetensors and JSON, whole or absent, exact to the bit.

    out_dir/checkpoints/step_00000500/
        config.json             architecture, with "model_type"
        model.safetensors       weights and persistent buffers, fp32
        optimizer.safetensors   optimiser states and random generator states
        state.json              step, rows consumed, tokens, seconds
        MANIFEST.json           sizes and SHA-256 of all files; tokenizer files

A checkpoint is written under a temporary name, synced to disk and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model1.errors import CheckpointError, ConfigError
from model1.strict import build_dataclass
from model1.tokenizer import Tokenizer
from model1.weights import atomic_directory, load_tensors, save_tensors, verify_manifest
from model1.weights.manifest import read_json

MODEL_NAME, OPTIMIZER_NAME, STATE_NAME = "model.safetensors", "optimizer.safetensors", "state.json"
STEP_PATTERN = re.compile(r"step_(\d{8})")
CPU_RNG, CUDA_RNG = "rng/cpu", "rng/cuda"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. Rows consumed are the position in the data."""

    step: int = 0  # optimiser steps done
    rows: int = 0
    tokens: int = 0  # rows * seq_len
    seconds: float = 0.0  # training time of all sittings, without validation and saving


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor appears once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators that the run may use."""
    states = {CPU_RNG: torch.get_rng_state()}
    if device.type == "cuda":
        states[CUDA_RNG] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_tensors` returned; a CPU checkpoint continues on a GPU and back."""
    torch.set_rng_state(states[CPU_RNG].cpu())
    if device.type == "cuda" and CUDA_RNG in states:
        torch.cuda.set_rng_state(states[CUDA_RNG].cpu(), device)


def write_checkpoint(
    folder: Path,
    *,
    config: dict[str, Any],
    model: nn.Module,
    tokenizer: Tokenizer,
    states: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint folder atomically, replacing one of the same name.

    Without `states` and `progress` it holds a model to use, not a run to continue.
    """
    with atomic_directory(folder) as temporary:
        _write_json(temporary / "config.json", config)
        save_tensors(temporary / MODEL_NAME, model_tensors(model))
        tokenizer.save(temporary)
        if states is not None:
            save_tensors(temporary / OPTIMIZER_NAME, states)
        if progress is not None:
            _write_json(temporary / STATE_NAME, asdict(progress))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = out_dir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if STEP_PATTERN.fullmatch(path.name))


def checkpoint_path(out_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return out_dir / "checkpoints" / f"step_{step:08d}"


def prune_checkpoints(out_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints."""
    for path in list_checkpoints(out_dir)[:-keep_last]:
        shutil.rmtree(path)


def restore(
    folder: Path, model: nn.Module, states: Mapping[str, Tensor], device: torch.device
) -> Progress:
    """Fill a model, optimiser states and the random generators from a checkpoint.

    Returns how far the run was. Errors: `CheckpointError` for anything missing, altered or of
    another shape.
    """
    verify_manifest(folder)
    load_weights(folder, model)
    saved = load_tensors(folder / OPTIMIZER_NAME)
    rng = {name: saved.pop(name) for name in list(saved) if name.startswith("rng/")}
    copy_tensors(saved, states, folder / OPTIMIZER_NAME)
    restore_rng(rng, device)
    try:
        return build_dataclass(Progress, read_json(folder / STATE_NAME))
    except ConfigError as error:
        raise CheckpointError(f"{folder / STATE_NAME}: {error}") from error


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: Path) -> None:
    """Write `source` into the tensors of `target`; names, shapes and dtypes must be equal."""
    missing, unknown = sorted(set(target) - set(source)), sorted(set(source) - set(target))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds an unknown tensor {unknown[0]}"
        raise CheckpointError(f"{where} {what}")
    for name, tensor in target.items():
        value = source[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise CheckpointError(
                f"{where}: {name} must be {tensor.dtype} {list(tensor.shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
        tensor.copy_(value)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the weights of a checkpoint folder into `model`. Errors: `CheckpointError`."""
    copy_tensors(load_tensors(folder / MODEL_NAME), model_tensors(model), folder / MODEL_NAME)

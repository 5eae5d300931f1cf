"""Checkpoints of a running training: safetensors and JSON, whole or absent, exact to the bit.

    out_dir/checkpoints/step_00000500/
        config.json             architecture, with "model_type"
        model.safetensors       weights and persistent buffers, fp32
        optimizer.safetensors   optimiser states and random generator states
        state.json              step, rows consumed, seconds, tokens
        tokenizer files

A checkpoint is written under a hidden name, synced to disk and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model1.config import build_dataclass
from model1.errors import CheckpointError, ConfigError
from model1.tokenizer import Tokenizer

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
    temporary = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_json(temporary / "config.json", config)
    _save(model_tensors(model), temporary / "model.safetensors")
    tokenizer.save(temporary)
    if states is not None:
        _save(states, temporary / "optimizer.safetensors")
    if progress is not None:
        _write_json(temporary / "state.json", asdict(progress))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # A copy of each: safetensors refuses views of one storage, which stacked states are.
    save_file({n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}, path)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Errors: `CheckpointError` naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint was. Errors: `CheckpointError`."""
    try:
        return build_dataclass(Progress, read_json(folder / "state.json"))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file on the CPU. Errors: `CheckpointError` naming the file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


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
    path = folder / "model.safetensors"
    copy_tensors(read_tensors(path), model_tensors(model), path)

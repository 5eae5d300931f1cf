"""`model1 info`: what a checkpoint is, what its cache costs, and what this machine offers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from model1.nn.kv import CacheKind
    from model1.nn.model import Model

PACKAGES = ("model1-llm", "torch", "numpy", "safetensors", "tokenizers", "fastapi", "triton")
CACHE_KINDS: tuple[CacheKind, ...] = ("fp32", "bf16", "fp8")
BLOCK_SIZE = 64  # of the cache that is measured; the bytes per token do not depend on it


def info(
    path: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; default: the shipped one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Load the checkpoint and describe it."""
    from model1.weights import default_checkpoint, load_model

    path = default_checkpoint() if path is None else path
    model, _ = load_model(path)
    report = {
        "checkpoint": str(path),
        "parameters": model.num_parameters(),
        "kv_bytes_per_token": _kv_bytes_per_token(model),
        "config": model.config.to_dict(),
        "machine": _machine(),
        "versions": _versions(),
    }
    print(json.dumps(report) if as_json else "\n".join(_lines(report)))


def _kv_bytes_per_token(model: Model) -> dict[str, int | None]:
    """By cache kind; None where the layout does not fit the model's channels."""
    sizes: dict[str, int | None] = {}
    for kind in CACHE_KINDS:
        try:
            sizes[kind] = model.allocate_kv_cache(1, BLOCK_SIZE, kind).bytes_per_token
        except ValueError:
            sizes[kind] = None
    return sizes


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """Nested data as indented `key: value` lines; what is absent shows as '-'."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
            continue
        if isinstance(value, list | tuple):
            value = ", ".join(str(item) for item in value)
        shown = "-" if value in (None, "") else f"{value:,}" if type(value) is int else value
        lines.append(f"{indent}{key}: {shown}")
    return lines

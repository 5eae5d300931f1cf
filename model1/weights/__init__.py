"""Checkpoints: safetensors with strict checks, FP8 and 4-bit storage, atomic writing."""

from __future__ import annotations

from model1.weights.atomic import atomic_directory
from model1.weights.checkpoint import save_checkpoint
from model1.weights.loading import (
    Checkpoint,
    default_checkpoint,
    load_model,
    load_state,
    read_checkpoint,
)
from model1.weights.manifest import verify_manifest
from model1.weights.tensors import load_tensors, save_tensors

__all__ = [
    "Checkpoint",
    "atomic_directory",
    "default_checkpoint",
    "load_model",
    "load_state",
    "load_tensors",
    "read_checkpoint",
    "save_checkpoint",
    "save_tensors",
    "verify_manifest",
]

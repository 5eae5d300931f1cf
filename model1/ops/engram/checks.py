"""Checks that the Engram operators share.

The messages are built on failure only: these checks run for every layer of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_int64(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise ValueError unless the tensor is int64 with so many axes."""
    if tensor.dtype != torch.int64 or tensor.ndim != ndim:
        raise ValueError(
            f"{name} must be int64 with {ndim} axes, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def check_eps(eps: float) -> None:
    """Raise ValueError for an eps that is not positive."""
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_for_kernel(device: torch.device, *, is_floating: bool, **tensors: Tensor | None) -> None:
    """Raise ValueError for what PyTorch would refuse and a kernel would misread.

    That is a tensor on another device, and, where numbers are expected, integers.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        if is_floating and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")

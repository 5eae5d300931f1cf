"""What the rotary operators accept; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, float32

from model1.ops.backend import KERNEL_DTYPES
from model1.ops.rope.angles import Rotation


def check_tail(x: Tensor, rotation: Rotation, backend: str) -> None:
    """Raise ValueError for the first argument that breaks the contract."""
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(
            f"x must be [t, d] or [t, h, d] floating point, got {list(x.shape)} {x.dtype}"
        )
    d_rope = rotation.cos.shape[-1]
    if d_rope % 2 or not 0 < d_rope <= x.shape[-1]:
        raise ValueError(f"d_rope must be even and in 2..{x.shape[-1]}, got {d_rope}")
    for name, angles in zip(("cos", "sin"), rotation, strict=True):
        if angles.shape != (x.shape[0], d_rope):
            rule = [x.shape[0], d_rope]
            raise ValueError(f"rotation.{name} must be {rule}, got {list(angles.shape)}")
        if angles.device != x.device:
            raise ValueError(f"rotation.{name} must be on {x.device}, got {angles.device}")
    if backend == "triton":
        _check_dtypes(x, rotation)


def _check_dtypes(x: Tensor, rotation: Rotation) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32 for triton, got {x.dtype}")
    for name, angles in zip(("cos", "sin"), rotation, strict=True):
        if angles.dtype != float32:
            raise ValueError(f"rotation.{name} must be float32 for triton, got {angles.dtype}")

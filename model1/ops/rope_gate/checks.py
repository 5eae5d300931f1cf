"""What `inverse_rope_gate` accepts; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32

from model1.ops.rope import Rotation


def check_arguments(
    out: Tensor, rotation: Rotation | None, gate: Tensor | None, d_rope: int
) -> None:
    """Raise ValueError for the first argument that breaks the contract."""
    if out.dim() != 3 or out.shape[2] == 0:
        raise ValueError(f"out must be [t, h, dv], got {list(out.shape)}")
    if out.dtype not in (bfloat16, float16, float32):
        raise ValueError(f"out must be bfloat16, float16 or float32, got {out.dtype}")
    if out.stride(2) != 1:
        raise ValueError(f"out must be contiguous along its last axis, got strides {out.stride()}")
    if rotation is not None:
        if d_rope % 2 or not 0 < d_rope <= out.shape[2]:
            raise ValueError(f"d_rope must be even and in 2..{out.shape[2]}, got {d_rope}")
        for name, angles in zip(("cos", "sin"), rotation, strict=True):
            if angles.shape != (out.shape[0], d_rope) or angles.dtype != float32:
                rule = f"[{out.shape[0]}, {d_rope}] float32"
                got = f"{list(angles.shape)} {angles.dtype}"
                raise ValueError(f"rotation.{name} must be {rule}, got {got}")
            _check_device(f"rotation.{name}", angles, out)
    if gate is None:
        return
    if gate.shape != out.shape[:2] or not gate.is_floating_point():
        rule = f"{list(out.shape[:2])} floating point"
        raise ValueError(f"gate must be {rule}, got {list(gate.shape)} {gate.dtype}")
    _check_device("gate", gate, out)


def _check_device(name: str, tensor: Tensor, out: Tensor) -> None:
    if tensor.device != out.device:
        raise ValueError(f"{name} must be on out's device {out.device}, got {tensor.device}")

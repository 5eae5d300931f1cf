"""What `norm_rope_store` accepts; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32

from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.checks import check_store
from model1.ops.rope import Rotation


def check_arguments(
    kv: Tensor,
    norm_weight: Tensor | None,
    rotation: Rotation,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    layout: KVLayout,
    block_size: int,
    norm_width: int,
) -> None:
    """Raise ValueError for the first argument that breaks the contract."""
    check_store(kv, kv_cache, slot_mapping, layout, block_size)
    if kv.dtype not in (bfloat16, float16, float32):
        raise ValueError(f"kv must be bfloat16, float16 or float32, got {kv.dtype}")
    if layout.d_rope % 2:
        raise ValueError(f"d_rope must be even to rotate pairs, got {layout.d_rope}")
    if norm_width not in (layout.d_nope, layout.d):
        raise ValueError(f"norm_width must be {layout.d_nope} or {layout.d}, got {norm_width}")
    if norm_weight is not None:
        if norm_weight.shape != (norm_width,) or not norm_weight.is_floating_point():
            got = f"{list(norm_weight.shape)} {norm_weight.dtype}"
            raise ValueError(f"norm_weight must be [{norm_width}] floating point, got {got}")
        _check_device("norm_weight", norm_weight, kv)
    for name, angles in zip(("cos", "sin"), rotation, strict=True):
        if angles.shape != (kv.shape[0], layout.d_rope) or angles.dtype != float32:
            got = f"{list(angles.shape)} {angles.dtype}"
            raise ValueError(
                f"rotation.{name} must be [{kv.shape[0]}, {layout.d_rope}] float32, got {got}"
            )
        _check_device(f"rotation.{name}", angles, kv)


def _check_device(name: str, tensor: Tensor, kv: Tensor) -> None:
    if tensor.device != kv.device:
        raise ValueError(f"{name} must be on kv's device {kv.device}, got {tensor.device}")

"""What the cache operators accept; the kernels trust it."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.kv_cache.layout import KVLayout

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLOT_DTYPES = (torch.int32, torch.int64)


def check_cache(
    kv_cache: Tensor, layout: KVLayout, block_size: int, name: str = "kv_cache"
) -> None:
    """Raise ValueError unless kv_cache is a cache of `layout`; `name` is the argument's."""
    if kv_cache.dtype != torch.uint8:
        raise ValueError(f"{name} must be uint8, got {kv_cache.dtype}")
    shape, stride = kv_cache.shape, kv_cache.stride()
    block_bytes = layout.block_bytes(block_size)
    if len(shape) != 2 or shape[0] == 0 or shape[1] < block_bytes:
        raise ValueError(
            f"{name} must be [num_blocks, at least {block_bytes} bytes] for {layout.name} "
            f"blocks of {block_size} tokens, got {list(shape)}"
        )
    if stride[1] != 1 or stride[0] < block_bytes or stride[0] % layout.block_step_bytes:
        raise ValueError(
            f"{name} blocks must be contiguous and a multiple of {layout.block_step_bytes} bytes "
            f"apart, at least {block_bytes}, got strides {stride}"
        )
    if torch.compiler.is_compiling():
        return  # a graph cannot ask where a tensor starts
    align, offset = layout.alignment_bytes, kv_cache.storage_offset()
    if offset % align:
        raise ValueError(f"{name} must start at a multiple of {align} bytes, got {offset}")


def check_slots(name: str, slots: Tensor, kv_cache: Tensor, block_size: int) -> None:
    """Raise ValueError for slots of a wrong dtype or device and, on the CPU, out of range.

    The range is not looked at where that would make the host wait for a GPU or break a graph
    under torch.compile: there what is no slot counts as -1.
    """
    if slots.dtype not in _SLOT_DTYPES:
        raise ValueError(f"{name} must be int64 or int32, got {slots.dtype}")
    _check_device(name, slots, kv_cache)
    if slots.device.type != "cpu" or slots.numel() == 0 or torch.compiler.is_compiling():
        return
    end = kv_cache.shape[0] * block_size
    for bound in slots.aminmax():
        if not -1 <= int(bound) < end:
            raise ValueError(f"{name} must be -1 or a slot below {end}, got {int(bound)}")


def check_store(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layout: KVLayout, block_size: int
) -> None:
    """Raise ValueError unless kv [t, d] can be written to slot_mapping [t] of kv_cache."""
    check_cache(kv_cache, layout, block_size)
    if kv.ndim != 2 or kv.shape[1] != layout.d:
        raise ValueError(f"kv must be [t, {layout.d}], got {list(kv.shape)}")
    if kv.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"kv must be floating point, got {kv.dtype}")
    if slot_mapping.shape != kv.shape[:1]:
        got = list(slot_mapping.shape)
        raise ValueError(f"slot_mapping must be [{kv.shape[0]}] like kv, got {got}")
    _check_device("kv", kv, kv_cache)
    check_slots("slot_mapping", slot_mapping, kv_cache, block_size)


def check_gather(
    kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int, dtype: torch.dtype
) -> None:
    """Raise ValueError unless tokens of kv_cache can be read as `dtype`."""
    check_cache(kv_cache, layout, block_size)
    check_slots("slots", slots, kv_cache, block_size)
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype must be floating point, got {dtype}")


def _check_device(name: str, tensor: Tensor, kv_cache: Tensor) -> None:
    device = kv_cache.device
    if tensor.device != device:
        raise ValueError(f"{name} must be on the cache's device {device}, got {tensor.device}")

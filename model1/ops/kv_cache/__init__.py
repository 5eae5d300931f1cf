"""The paged KV cache: quantise-and-store, gather-and-dequantise, and their checks.

`layout.py` says which byte is what, `ref.py` does the work in plain PyTorch on any device.
Caches carry no gradient. Slots are addressed in 64 bits throughout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model1.ops.kv_cache import ref
from model1.ops.kv_cache.layout import KVLayout, kv_layout

__all__ = [
    "KVLayout",
    "allocate_kv_cache",
    "gather_and_dequantize",
    "gather_rope",
    "kv_layout",
    "quantize_and_store",
]

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLOT_DTYPES = (torch.int32, torch.int64)


def allocate_kv_cache(
    num_blocks: int, block_size: int, layout: KVLayout, device: torch.device | str
) -> Tensor:
    """A zero-filled cache, uint8 [num_blocks, layout.block_stride_bytes(block_size)].

    Raises ValueError if num_blocks or block_size is not positive.
    """
    if num_blocks <= 0:
        raise ValueError(f"num_blocks must be positive, got {num_blocks}")
    stride_bytes = layout.block_stride_bytes(block_size)
    if torch.device(device).type == "cpu":
        # NumPy asks the system for zero pages, which cost nothing until a block is written.
        return torch.from_numpy(np.zeros((num_blocks, stride_bytes), np.uint8))
    return torch.zeros(num_blocks, stride_bytes, dtype=torch.uint8, device=device)


def quantize_and_store(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor, *, layout: KVLayout, block_size: int
) -> None:
    """Write one row per token into the cache, in place.

    FP8, per tile of plain channels:
        scale = 2^ceil(log2(max(amax|x| / 448, 1e-4))),  code = e4m3(x / scale)
    kv: [t, d] floating point. kv_cache: uint8 [num_blocks, >= block bytes]; each block is
    contiguous, the block stride any multiple of layout.row_bytes. slot_mapping: [t] int64 or
    int32; -1 = do not write, and a slot may occur once. t = 0 does nothing. A tile with NaN or
    an infinity reads back as NaN throughout.
    Raises ValueError for a wrong shape, dtype, device or stride and, on the CPU, for a slot
    outside -1 .. num_blocks * block_size - 1 (a GPU would have to stop to look).
    """
    _check_cache(kv_cache, layout, block_size)
    if kv.ndim != 2 or kv.shape[1] != layout.d:
        raise ValueError(f"kv must be [t, {layout.d}], got {list(kv.shape)}")
    if kv.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"kv must be floating point, got {kv.dtype}")
    if slot_mapping.shape != kv.shape[:1]:
        got = list(slot_mapping.shape)
        raise ValueError(f"slot_mapping must be [{kv.shape[0]}] like kv, got {got}")
    _check_device("kv", kv, kv_cache)
    _check_slots("slot_mapping", slot_mapping, kv_cache, block_size)
    ref.quantize_and_store_ref(kv, kv_cache, slot_mapping, layout=layout, block_size=block_size)


def gather_and_dequantize(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The tokens at the given slots, dequantised: dtype [*slots.shape, d].

    FP8: k = e4m3 code * scale as an fp32 product, rounded once to dtype. v32_fp8 scales may be
    any fp32 number. slots: int64 or int32 of any shape; -1 gives zeros, whatever the cache
    holds. Other slots, padding bytes and block padding may hold anything, NaN included.
    Raises ValueError as `quantize_and_store` does, and for a dtype that is not floating point.
    """
    _check_gather(kv_cache, slots, layout, block_size, dtype)
    return ref.gather_and_dequantize_ref(
        kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype
    )


def gather_rope(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The last d_rope channels of `gather_and_dequantize`, without reading the others."""
    _check_gather(kv_cache, slots, layout, block_size, dtype)
    return ref.gather_rope_ref(kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype)


def _check_gather(
    kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int, dtype: torch.dtype
) -> None:
    _check_cache(kv_cache, layout, block_size)
    _check_slots("slots", slots, kv_cache, block_size)
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype must be floating point, got {dtype}")


def _check_cache(kv_cache: Tensor, layout: KVLayout, block_size: int) -> None:
    if kv_cache.dtype != torch.uint8:
        raise ValueError(f"kv_cache must be uint8, got {kv_cache.dtype}")
    shape, stride, offset = kv_cache.shape, kv_cache.stride(), kv_cache.storage_offset()
    block_bytes = layout.block_bytes(block_size)
    if len(shape) != 2 or shape[0] == 0 or shape[1] < block_bytes:
        raise ValueError(
            f"kv_cache must be [num_blocks, at least {block_bytes} bytes] for {layout.name} "
            f"blocks of {block_size} tokens, got {list(shape)}"
        )
    if stride[1] != 1 or stride[0] < block_bytes or stride[0] % layout.row_bytes:
        raise ValueError(
            f"kv_cache blocks must be contiguous and a multiple of {layout.row_bytes} bytes "
            f"apart, at least {block_bytes}, got strides {stride}"
        )
    align = layout.alignment_bytes
    if offset % align:
        raise ValueError(f"kv_cache must start at a multiple of {align} bytes, got {offset}")


def _check_device(name: str, tensor: Tensor, kv_cache: Tensor) -> None:
    device = kv_cache.device
    if tensor.device != device:
        raise ValueError(f"{name} must be on the cache's device {device}, got {tensor.device}")


def _check_slots(name: str, slots: Tensor, kv_cache: Tensor, block_size: int) -> None:
    if slots.dtype not in _SLOT_DTYPES:
        raise ValueError(f"{name} must be int64 or int32, got {slots.dtype}")
    _check_device(name, slots, kv_cache)
    if slots.device.type != "cpu" or slots.numel() == 0:
        return
    end = kv_cache.shape[0] * block_size
    for bound in slots.aminmax():
        if not -1 <= int(bound) < end:
            raise ValueError(f"{name} must be -1 or a slot below {end}, got {int(bound)}")

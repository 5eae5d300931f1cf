"""The paged KV cache: quantise-and-store, gather-and-dequantise, and their checks.

`layout.py` says which byte is what, `ref.py` does the work in plain PyTorch on any device,
`portable.py` reads and `model1.ops.kv_write` writes on a GPU. Caches carry no gradient. Slots are
addressed in 64 bits throughout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model1.ops.kv_cache.checks import check_cache, check_gather, check_slots, check_store
from model1.ops.kv_cache.dispatch import GATHER_AND_DEQUANTIZE, GATHER_ROPE, gather, store
from model1.ops.kv_cache.layout import KVLayout, kv_layout

__all__ = [
    "KVLayout",
    "allocate_kv_cache",
    "check_cache",
    "check_slots",
    "gather_and_dequantize",
    "gather_rope",
    "kv_layout",
    "quantize_and_store",
]


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
    kv: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    backend: str = "auto",
) -> None:
    """Write one row per token into the cache, in place.

    FP8, per tile of plain channels:
        scale = 2^ceil(log2(max(amax|x| / 448, 1e-4))),  code = e4m3(x / scale)
    kv: [t, d] floating point, any strides. kv_cache: uint8 [num_blocks, >= block bytes]; each
    block is contiguous, the block stride any multiple of layout.block_step_bytes (16 for FP8).
    slot_mapping: [t] int64 or int32; -1 = do not write, and a slot may occur once. t = 0 does
    nothing. A tile with NaN or an infinity reads back as NaN throughout. Backends write the same
    bytes.
    Raises ValueError for a wrong shape, dtype, device or stride and, on the CPU, for a slot
    outside -1 .. num_blocks * block_size - 1; a GPU, which would have to stop to look, and a
    compiled graph take it for -1. BackendUnavailable for a backend that cannot run here.
    """
    check_store(kv, kv_cache, slot_mapping, layout, block_size)
    store(kv, kv_cache, slot_mapping, layout, block_size, backend)


def gather_and_dequantize(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The tokens at the given slots, dequantised: dtype [*slots.shape, d].

    FP8: k = e4m3 code * scale as an fp32 product, rounded once to dtype. v32_fp8 scales may be
    any fp32 number. slots: int64 or int32 of any shape; -1 gives zeros, whatever the cache
    holds. Other slots, padding bytes and block padding may hold anything, NaN included.
    Raises as `quantize_and_store` does, with its rule for slots outside the cache, and ValueError
    for a dtype that is not floating point.
    """
    check_gather(kv_cache, slots, layout, block_size, dtype)
    return gather(GATHER_AND_DEQUANTIZE, kv_cache, slots, layout, block_size, dtype, backend)


def gather_rope(
    kv_cache: Tensor,
    slots: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The last d_rope channels of `gather_and_dequantize`, without reading the others.

    dtype [*slots.shape, d_rope]; zeros at -1. Raises as `gather_and_dequantize` does.
    """
    check_gather(kv_cache, slots, layout, block_size, dtype)
    return gather(GATHER_ROPE, kv_cache, slots, layout, block_size, dtype, backend)

"""FlashMLA's cache tensors as the byte caches of `model1.ops.kv_cache`, without a copy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from model1.errors import ConfigError
from model1.ops.kv_cache import KVLayout

_FP8_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)
_D_NOPE_STEP = 64  # quantised channels come in tiles of 64 or 128
_D_ROPE = 64  # where a plain cache is cut changes nothing; this is where the models cut it


class ByteCache(NamedTuple):
    """kv_cache: uint8 [num_blocks, block bytes]."""

    kv_cache: Tensor
    layout: KVLayout
    block_size: int


def is_packed(k_cache: Tensor) -> bool:
    """Whether the elements are bytes of packed tokens."""
    return k_cache.dtype in _FP8_DTYPES


def byte_cache(name: str, k_cache: Tensor, d: int) -> ByteCache:
    """k_cache [num_blocks, page, 1, width], whose tokens have d channels, as bytes.

    Raises ValueError unless it has one head, contiguous blocks and a known token size.
    """
    num_blocks, block_size, h_k, width = k_cache.shape
    if h_k != 1:
        raise ValueError(f"{name} must have one head, got {h_k}")
    if not is_packed(k_cache):
        layout = _plain_layout(k_cache.dtype, width, d)
    elif torch.compiler.is_compiling():  # a graph is traced once, and through no cache
        layout = _fp8_layout(width, d)
    else:
        layout = _known_fp8_layout(width, d)
    if layout is None:
        raise ValueError(f"no cache layout has {d} channels in {width} elements of {k_cache.dtype}")
    if k_cache.stride(3) != 1 or (block_size > 1 and k_cache.stride(1) != width):
        raise ValueError(f"{name} must have contiguous blocks, got strides {k_cache.stride()}")
    tokens = k_cache.view(torch.uint8)
    # a single block may claim any stride, as nothing lies a stride further on
    stride_bytes = tokens.stride(0) if num_blocks > 1 else layout.block_stride_bytes(block_size)
    size = (num_blocks, layout.block_bytes(block_size))
    return ByteCache(tokens.as_strided(size, (stride_bytes, 1)), layout, block_size)


def _plain_layout(dtype: torch.dtype, width: int, d: int) -> KVLayout | None:
    d_rope = _D_ROPE if d > _D_ROPE else 0
    if width != d or dtype not in (torch.bfloat16, torch.float32):
        return None
    return KVLayout("bf16" if dtype == torch.bfloat16 else "fp32", d - d_rope, d_rope)


def _fp8_layout(token_bytes: int, d: int) -> KVLayout | None:
    """The one split of d channels in which a token takes so many bytes.

    A token shrinks as channels move from bf16 to FP8, and no width gives a V3.2 and a MODEL1
    token the same size, so there is at most one.
    """
    for d_nope in range(_D_NOPE_STEP, d + 1, _D_NOPE_STEP):
        for name in ("model1_fp8", "v32_fp8"):
            try:
                layout = KVLayout(name, d_nope, d - d_nope)
            except ConfigError:
                continue  # this format cannot be cut here
            if layout.bytes_per_token == token_bytes:
                return layout
    return None


_known_fp8_layout = functools.cache(_fp8_layout)

"""What `paged_decode` accepts; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, int32

from model1.ops.kv_cache import KVLayout, check_cache
from model1.ops.ragged import check_prefix_sums

_Q_DTYPES = (bfloat16, float16, float32)


def check_query(
    q: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    attn_sink: Tensor | None,
) -> None:
    """The query, how its rows belong to requests, and the sink."""
    if q.dtype not in _Q_DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if cu_seqlens_q is None:
        if max_seqlen_q is not None:
            raise ValueError("max_seqlen_q needs cu_seqlens_q")
        if q.dim() != 4 or 0 in q.shape[1:]:
            raise ValueError(f"q must be [b, s_q, h, d], got {list(q.shape)}")
        _check_int32("cache_seqlens", cache_seqlens, (q.shape[0],), q)
    else:
        if max_seqlen_q is None or max_seqlen_q < 1:
            raise ValueError(f"cu_seqlens_q needs max_seqlen_q of at least 1, got {max_seqlen_q}")
        if q.dim() != 3 or 0 in q.shape[1:]:
            raise ValueError(f"q must be [t, h, d] with cu_seqlens_q, got {list(q.shape)}")
        _check_int32("cache_seqlens", cache_seqlens, (cache_seqlens.numel(),), q)
        _check_int32("cu_seqlens_q", cu_seqlens_q, (cache_seqlens.numel() + 1,), q)
        check_prefix_sums("q", cu_seqlens_q, max_seqlen_q, len(q), owns_all=False)
    if q.stride(-1) != 1:
        raise ValueError(f"q must be contiguous along its last axis, got strides {q.stride()}")
    if attn_sink is None:
        return
    h = q.shape[-2]
    if attn_sink.shape != (h,) or attn_sink.dtype != float32 or not attn_sink.is_contiguous():
        got = f"{list(attn_sink.shape)} {attn_sink.dtype}"
        raise ValueError(f"attn_sink must be contiguous [{h}] float32, got {got}")
    _check_device("attn_sink", attn_sink, q)


def check_paged_cache(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    layout: KVLayout | None,
    block_size: int | None,
    value_dim: int,
) -> None:
    """The cache and what points into it."""
    if layout is None:
        _check_plain_cache(q, kv_cache, block_size)
    elif block_size is None:
        raise ValueError("layout needs block_size")
    else:
        check_cache(kv_cache, layout, block_size)
        if q.shape[-1] != layout.d:
            raise ValueError(f"q must have the {layout.d} channels of the cache, got {q.shape[-1]}")
    _check_device("kv_cache", kv_cache, q)
    if not 0 < value_dim <= q.shape[-1]:
        raise ValueError(f"value_dim must be in 1..{q.shape[-1]}, got {value_dim}")
    b = cache_seqlens.numel()
    if block_table.dim() != 2 or block_table.shape[0] != b or block_table.dtype != int32:
        got = f"{list(block_table.shape)} {block_table.dtype}"
        raise ValueError(f"block_table must be [{b}, max_blocks] int32, got {got}")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError("block_table must be contiguous along its last axis")
    _check_device("block_table", block_table, q)


def _check_plain_cache(q: Tensor, kv_cache: Tensor, block_size: int | None) -> None:
    shape = list(kv_cache.shape)
    if len(shape) != 4 or 0 in shape or shape[3] != q.shape[-1]:
        raise ValueError(
            f"kv_cache must be [num_blocks, block_size, hkv, {q.shape[-1]}] without a layout, "
            f"got {shape}"
        )
    if kv_cache.dtype != q.dtype:
        raise ValueError(f"kv_cache must have q's dtype {q.dtype}, got {kv_cache.dtype}")
    if kv_cache.stride(-1) != 1:
        got = kv_cache.stride()
        raise ValueError(f"kv_cache must be contiguous along its last axis, got strides {got}")
    if q.shape[-2] % shape[2]:
        raise ValueError(f"h must be a multiple of hkv, got {q.shape[-2]} and {shape[2]}")
    if block_size not in (None, shape[1]):
        raise ValueError(f"block_size must be the cache's {shape[1]}, got {block_size}")


def _check_int32(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != int32 or not tensor.is_contiguous():
        got = f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} must be contiguous {list(shape)} int32, got {got}")
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")

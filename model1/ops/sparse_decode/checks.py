"""What `sparse_decode` accepts; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, int32

from model1.ops.kv_cache import KVLayout, check_cache

_Q_DTYPES = (bfloat16, float16, float32)


def check_arguments(q: Tensor, layout: KVLayout, value_dim: int, attn_sink: Tensor | None) -> None:
    """The query, the value width and the sink."""
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [b, s_q, h, d] or [t, h, d], got {list(q.shape)}")
    if q.dtype not in _Q_DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] != layout.d:
        raise ValueError(f"q must have the {layout.d} channels of the cache, got {q.shape[-1]}")
    if q.stride(-1) != 1:
        raise ValueError(f"q must be contiguous along its last axis, got strides {q.stride()}")
    if not 0 < value_dim <= layout.d:
        raise ValueError(f"value_dim must be in 1..{layout.d}, got {value_dim}")
    if attn_sink is None:
        return
    if attn_sink.shape != q.shape[2:3] or attn_sink.dtype != float32:
        got = f"{list(attn_sink.shape)} {attn_sink.dtype}"
        raise ValueError(f"attn_sink must be [{q.shape[2]}] float32, got {got}")
    _check_vector("attn_sink", attn_sink, q)


def check_scope(
    prefix: str,
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    topk_length: Tensor | None,
    layout: KVLayout,
    block_size: int,
) -> None:
    """One cache with the slots and lengths that point into it; `prefix` names the arguments."""
    _check_device(f"{prefix}kv_cache", kv_cache, q)
    check_cache(kv_cache, layout, block_size, name=f"{prefix}kv_cache")
    name = f"{prefix}topk_indices"
    if topk_indices.dim() != 3 or topk_indices.shape[:2] != q.shape[:2]:
        got = list(topk_indices.shape)
        raise ValueError(f"{name} must be [{q.shape[0]}, {q.shape[1]}, topk], got {got}")
    if topk_indices.dtype != int32:
        raise ValueError(f"{name} must be int32, got {topk_indices.dtype}")
    if topk_indices.shape[-1] > 1 and topk_indices.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous along its last axis")
    _check_device(name, topk_indices, q)
    if topk_length is not None:
        name = f"{prefix}topk_length"
        if topk_length.shape != q.shape[:1] or topk_length.dtype != int32:
            got = f"{list(topk_length.shape)} {topk_length.dtype}"
            raise ValueError(f"{name} must be [{q.shape[0]}] int32, got {got}")
        _check_vector(name, topk_length, q)


def check_extra_scope(
    q: Tensor,
    kv_cache: Tensor | None,
    topk_indices: Tensor | None,
    topk_length: Tensor | None,
    layout: KVLayout,
    block_size: int | None,
) -> None:
    """The second cache, if there is one."""
    if kv_cache is None:
        if topk_indices is not None or topk_length is not None:
            raise ValueError("extra_topk_indices and extra_topk_length need extra_kv_cache")
    elif topk_indices is None or block_size is None:
        raise ValueError("extra_kv_cache needs extra_topk_indices and extra_block_size")
    else:
        check_scope("extra_", q, kv_cache, topk_indices, topk_length, layout, block_size)


def _check_vector(name: str, vector: Tensor, q: Tensor) -> None:
    _check_device(name, vector, q)
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {vector.stride(0)}")


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")

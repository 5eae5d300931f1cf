"""What `sparse_prefill` accepts; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, float64, int32

_DTYPES = (bfloat16, float16, float32, float64)


def check_queries_and_keys(q: Tensor, kv: Tensor, value_dim: int) -> None:
    """The two floating-point operands."""
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [t, h, d], got {list(q.shape)}")
    d = q.shape[-1]
    if d % 16:
        raise ValueError(f"q must have a multiple of 16 channels, got {d}")
    if kv.dim() != 2 or kv.shape[-1] != d:
        raise ValueError(f"kv must be [s, {d}], got {list(kv.shape)}")
    if q.dtype not in _DTYPES or kv.dtype != q.dtype:
        raise ValueError(
            "q and kv must both be bfloat16, float16, float32 or float64, "
            f"got {q.dtype} and {kv.dtype}"
        )
    if not 0 < value_dim <= d:
        raise ValueError(f"value_dim must be in 1..{d}, got {value_dim}")
    for name, tensor in (("q", q), ("kv", kv)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous along its last axis")
    _check_device("kv", kv, q)


def check_lists(q: Tensor, topk_indices: Tensor, topk_length: Tensor | None) -> None:
    """The rows that each query names."""
    if topk_indices.dim() != 2 or topk_indices.shape[0] != q.shape[0]:
        got = list(topk_indices.shape)
        raise ValueError(f"topk_indices must be [{q.shape[0]}, topk], got {got}")
    if topk_indices.dtype != int32:
        raise ValueError(f"topk_indices must be int32, got {topk_indices.dtype}")
    if topk_indices.shape[1] > 1 and topk_indices.stride(1) != 1:
        raise ValueError("topk_indices must be contiguous along its last axis")
    _check_device("topk_indices", topk_indices, q)
    if topk_length is not None:
        _check_vector("topk_length", topk_length, q, q.shape[0], int32)


def check_sink(q: Tensor, attn_sink: Tensor | None) -> None:
    """The extra logit of every head."""
    if attn_sink is not None:
        _check_vector("attn_sink", attn_sink, q, q.shape[1], float32)


def _check_vector(name: str, tensor: Tensor, q: Tensor, size: int, dtype: object) -> None:
    if tensor.shape != (size,) or tensor.dtype != dtype or not tensor.is_contiguous():
        got = f"{list(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous [{size}] {dtype}, got {got}")
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")

"""What `mha_prefill` accepts; the kernels trust it."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.ragged import check_prefix_sums

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values."""
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [t, h, d], got {list(q.shape)}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if k.dim() != 3 or k.shape[2] != q.shape[2] or k.shape[1] == 0:
        raise ValueError(f"k must be [s, hkv, {q.shape[2]}], got {list(k.shape)}")
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] == 0:
        raise ValueError(f"v must be [{k.shape[0]}, {k.shape[1]}, dv], got {list(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"h must be a multiple of hkv, got {q.shape[1]} and {k.shape[1]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            want, got = f"{q.dtype} on {q.device}", f"{x.dtype} on {x.device}"
            raise ValueError(f"{name} must be {want} like q, got {got}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous along its last axis, got {x.stride()}")


def check_lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    q: Tensor, k: Tensor,
) -> None:  # fmt: skip
    """How queries and keys belong to requests."""
    _check_axis("q", cu_seqlens_q, max_seqlen_q, q)
    _check_axis("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of one length, got {got}")


def _check_axis(axis: str, cu_seqlens: Tensor, max_seqlen: int, x: Tensor) -> None:
    name = f"cu_seqlens_{axis}"
    is_vector = cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0 and cu_seqlens.is_contiguous()
    if not is_vector or cu_seqlens.dtype != torch.int32:
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"{name} must be contiguous [b + 1] int32, got {got}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name} must be on q's device {x.device}, got {cu_seqlens.device}")
    check_prefix_sums(axis, cu_seqlens, max_seqlen, len(x), owns_all=True)

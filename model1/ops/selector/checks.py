"""What the selector, the remainder and their composite accept; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, int32

from model1.ops.kv_cache import KVLayout, check_cache
from model1.ops.ragged import check_prefix_sums, is_readable

_Q_DTYPES = (bfloat16, float16, float32)
_INDEX_DTYPES = (bfloat16, float32)


def check_query(name: str, q: Tensor, width: int) -> None:
    """Rows of queries, [t, h, width]."""
    if q.dim() != 3 or q.shape[1] == 0 or q.shape[2] != width:
        raise ValueError(f"{name} must be [t, h, {width}], got {list(q.shape)}")
    if q.dtype not in _Q_DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {q.dtype}")
    if q.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous along its last axis, got {q.stride()}")


def check_rows(
    q: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, key_end: Tensor,
    max_seqlen: int, block_size: int,
) -> None:  # fmt: skip
    """How rows belong to requests and what they see."""
    if block_table.dim() != 2 or block_table.dtype != int32:
        got = f"{list(block_table.shape)} {block_table.dtype}"
        raise ValueError(f"block_table must be [b, max_blocks] int32, got {got}")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError("block_table must be contiguous along its last axis")
    check_device("block_table", block_table, q)
    check_vector("cu_seqlens_q", cu_seqlens_q, len(block_table) + 1, q)
    check_vector("key_end", key_end, len(q), q)
    if max_seqlen_q < 1:
        raise ValueError(f"max_seqlen_q must be at least 1, got {max_seqlen_q}")
    capacity = block_table.shape[1] * block_size
    if not 0 <= max_seqlen <= capacity:
        raise ValueError(
            f"max_seqlen must be in 0..{capacity}, the tokens of a table's row, got {max_seqlen}"
        )
    check_prefix_sums("q", cu_seqlens_q, max_seqlen_q, len(q), owns_all=False)
    if is_readable(key_end) and len(key_end) and int(key_end.max()) > max_seqlen:
        got = int(key_end.max())
        raise ValueError(f"key_end must be at most max_seqlen = {max_seqlen}, got {got}")


def check_index_cache(
    index_cache: Tensor, kv_cache: Tensor, layout: KVLayout, block_size: int, q: Tensor
) -> None:
    """Selector vectors beside the token cache whose rotary keys they need."""
    check_cache(kv_cache, layout, block_size)
    check_device("kv_cache", kv_cache, q)
    if index_cache.dim() != 2 or index_cache.shape[1] == 0 or index_cache.stride(1) != 1:
        got = f"{list(index_cache.shape)} with strides {index_cache.stride()}"
        raise ValueError(f"index_cache must be [num_slots, r], contiguous along r, got {got}")
    if index_cache.dtype not in _INDEX_DTYPES:
        raise ValueError(f"index_cache must be bfloat16 or float32, got {index_cache.dtype}")
    if len(index_cache) != len(kv_cache) * block_size:
        num_slots = len(kv_cache) * block_size
        raise ValueError(f"index_cache must have {num_slots} slots, got {len(index_cache)}")
    check_device("index_cache", index_cache, q)


def check_choice(topk: int, sliding_window: int) -> None:
    """How many tokens are chosen, and how many of them whatever their score."""
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    if not 0 <= sliding_window <= topk:
        raise ValueError(f"sliding_window must be in 0..topk = {topk}, got {sliding_window}")


def check_vector(name: str, vector: Tensor, length: int, q: Tensor) -> None:
    """A contiguous int32 vector on q's device."""
    if vector.shape != (length,) or vector.dtype != int32 or not vector.is_contiguous():
        got = f"{list(vector.shape)} {vector.dtype}"
        raise ValueError(f"{name} must be contiguous [{length}] int32, got {got}")
    check_device(name, vector, q)


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    """The device that all arguments share."""
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")

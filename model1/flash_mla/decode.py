"""`flash_mla_with_kvcache`: dense and sparse decode over a paged cache."""

from __future__ import annotations

import math

from torch import Tensor

from model1.flash_mla.caches import byte_cache, is_packed
from model1.flash_mla.metadata import (
    FlashMLASchedMeta,
    SchedConfig,
    refusals_as_runtime_errors,
    require,
    require_entries,
)
from model1.ops.paged_decode import paged_decode
from model1.ops.sparse_decode import sparse_decode


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a paged cache: all keys of a request or, given `indices`, a list per query.

    out = softmax(softmax_scale q k^T) v,  v = the first head_dim_v channels of k

    q: [b, s_q, h_q, d]. k_cache: [num_blocks, page, h_k, d] in q's dtype, or packed tokens,
    [num_blocks, page, 1, bytes] of float8_e4m3fn, int8 or uint8: 656 bytes are V3.2's for d = 576,
    584 MODEL1's for d = 512; other splits of d follow from the size. Blocks of packed tokens are
    contiguous and a multiple of 16 bytes apart. is_fp8_kvcache must be True for them.
    softmax_scale: None means d ** -0.5.

    Dense: block_table [b, max_blocks] and cache_seqlens [b] int32; nothing behind a request's
    length is read. causal: query j sees all keys but the last s_q - 1 - j.
    Sparse: indices [b, s_q, topk] int32 slots (page number * page + offset); -1 and whatever else
    is no slot of the cache counts for nothing (FlashMLA would read there). topk_length [b] int32
    counts a request's entries; extra_* name a second cache in the same softmax; attn_sink [h_q]
    fp32. block_table and cache_seqlens are ignored; an unpacked cache is bf16 or fp32.

    Returns out [b, s_q, h_q, head_dim_v] and lse [b, h_q, s_q] fp32, natural log, a transposed
    view. A query without keys has out = 0 and lse = +inf. Raises AssertionError for arguments
    that contradict each other and for a holder first used with other shapes, RuntimeError for
    tensors that cannot be used. Source: the public FlashMLA interface.
    """
    holder = tile_scheduler_metadata
    require(isinstance(holder, FlashMLASchedMeta), "use get_mla_metadata()")
    require(num_splits is None, "num_splits must be None")
    extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with refusals_as_runtime_errors():
        config = _config(q, k_cache, indices, *extra[:2], causal, is_fp8_kvcache)
        if indices is None:
            is_dense = all(x is None for x in (attn_sink, topk_length, *extra))
            require(is_dense, "attn_sink, topk_length and extra_* need indices")
            if block_table is None or cache_seqlens is None:
                raise AssertionError("dense decode needs block_table and cache_seqlens")
            holder.accept(config)
            pages = (block_table, cache_seqlens)
            out, lse = _dense(q, k_cache, *pages, head_dim_v, scale, causal, is_fp8_kvcache)
        else:
            require(not causal, "causal must be False where indices choose the keys")
            require(is_fp8_kvcache or not is_packed(k_cache), "is_fp8_kvcache must be True")
            holder.accept(config)
            main = (k_cache, indices, topk_length)
            out, lse = _sparse(q, main, extra, attn_sink, head_dim_v, scale, is_fp8_kvcache)
    return out, lse.transpose(1, 2)


def _config(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    causal: bool,
    is_fp8_kvcache: bool,
) -> SchedConfig:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("extra_k_cache", extra_k_cache)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, got {list(tensor.shape)}")
    b, s_q, h_q, _ = q.shape
    return SchedConfig(
        b=b,
        s_q=s_q,
        h_q=h_q,
        page_block_size=k_cache.shape[1],
        h_k=k_cache.shape[2],
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        topk=None if indices is None else indices.shape[-1],
        extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
        extra_topk=None if extra_indices is None else extra_indices.shape[-1],
    )


def _dense(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    value_dim: int,
    softmax_scale: float,
    causal: bool,
    is_fp8_kvcache: bool,
) -> tuple[Tensor, Tensor]:
    kv_cache, layout, block_size = k_cache, None, None
    if is_packed(k_cache):
        if not is_fp8_kvcache:
            raise ValueError(f"k_cache must be {q.dtype} like q, got {k_cache.dtype}")
        kv_cache, layout, block_size = byte_cache("k_cache", k_cache, q.shape[-1])
    return paged_decode(
        q, kv_cache, block_table, cache_seqlens,
        value_dim=value_dim, softmax_scale=softmax_scale, causal=causal,
        layout=layout, block_size=block_size, empty_lse=math.inf,
    )  # fmt: skip


def _sparse(
    q: Tensor,
    main: tuple[Tensor, Tensor, Tensor | None],
    extra: tuple[Tensor | None, Tensor | None, Tensor | None],
    attn_sink: Tensor | None,
    value_dim: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
) -> tuple[Tensor, Tensor]:
    """`main` and `extra`: cache, slots and lengths."""
    k_cache, indices, topk_length = main
    require_entries("indices", indices)
    if is_fp8_kvcache and not is_packed(k_cache):
        raise ValueError(f"is_fp8_kvcache is for packed tokens, k_cache is {k_cache.dtype}")
    d = q.shape[-1]
    kv_cache, layout, block_size = byte_cache("k_cache", k_cache, d)
    extra_k_cache, extra_indices, extra_length = extra
    extra_kv_cache, extra_block_size = None, None
    if extra_k_cache is not None:
        extra_kv_cache, extra_layout, extra_block_size = byte_cache(
            "extra_k_cache", extra_k_cache, d
        )
        if extra_layout != layout:
            raise ValueError(
                f"extra_k_cache must be {layout.name} like k_cache, got {extra_layout.name}"
            )
    return sparse_decode(
        q, kv_cache, indices,
        layout=layout, block_size=block_size, value_dim=value_dim, softmax_scale=softmax_scale,
        topk_length=topk_length, extra_kv_cache=extra_kv_cache, extra_topk_indices=extra_indices,
        extra_topk_length=extra_length, extra_block_size=extra_block_size, attn_sink=attn_sink,
        empty_lse=math.inf,
    )  # fmt: skip

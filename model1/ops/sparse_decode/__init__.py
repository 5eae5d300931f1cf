"""Sparse decode: each query attends to its own list of slots in one or two paged caches.

The operator of the public `flash_mla_with_kvcache` with `indices`, without its restrictions: any
number of heads, any block size, any list length, every cache layout of `model1.ops.kv_cache`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout
from model1.ops.sparse_decode.checks import (
    check_arguments,
    check_extra_scope,
    check_scope,
)
from model1.ops.sparse_decode.choice import choose_backend

SPARSE_DECODE = Operator(
    name="sparse_decode",
    implementations={
        "ref": "model1.ops.sparse_decode.ref:sparse_decode_ref",
        "triton": "model1.ops.sparse_decode.portable:sparse_decode_triton",
        "hopper": "model1.ops.sparse_decode.hopper:sparse_decode_hopper",
    },
)


def sparse_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    value_dim: int,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_topk_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_block_size: int | None = None,
    attn_sink: Tensor | None = None,
    empty_lse: float = -math.inf,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the cached tokens its row of `topk_indices` names.

    out[i, h] = sum_j e^(p_j) v_j / (sum_j e^(p_j) + e^(attn_sink[h])),  p_j = softmax_scale q . k_j
    lse[i, h] = ln sum_j e^(p_j)

    j runs over the valid entries of both lists; k_j is the dequantised token (rounded to q's dtype
    as FlashMLA rounds it), v_j its first `value_dim` channels. An entry is valid if it is a slot of
    its cache and its position is below the row's length; all others, -1 first, are ignored.

    q: [b, s_q, h, d] bf16, fp16 or fp32, or [t, h, d], which means b = t, s_q = 1: so go requests
    with different numbers of queries. Any strides with a contiguous last axis. kv_cache: uint8
    [num_blocks, block bytes] of `layout`, as `allocate_kv_cache` makes it, any block stride.
    topk_indices: [b, s_q, topk] (or [t, topk]) int32 slots, in any order, topk may be 0.
    topk_length: [b] int32, entries counted per request; None = all. extra_*: a second cache of the
    same layout with its own block size, attended in the same softmax. attn_sink: [h] fp32
    natural-log logit, +-inf allowed, part of no lse.

    Returns out like q with `value_dim` channels and lse [b, s_q, h] (or [t, h]) fp32. A row
    without a valid key gives out = 0 and lse = empty_lse. Slots that no valid entry names may
    hold anything, NaN included, and are not read. deterministic: a row's bits do not depend on its
    batch mates, nor on what entries that are ignored follow its last valid one.
    Not differentiable (`sparse_prefill` is). Raises ValueError for shapes, dtypes, devices and
    strides, BackendUnavailable for a backend that cannot run here. triton takes d_nope and d_rope
    that are multiples of 16 and, as does `paged_decode`, at most 1088 channels (on GPUs with 99 KB
    of shared memory 1024, in fp32 768). hopper, which "auto" takes for many rows and not for
    deterministic ones, has the limits that choice.py says.
    Source: the public FlashMLA interface; docs/kv_layout.md for the bytes.
    """
    is_flat = q.dim() == 3
    if is_flat:
        q, topk_indices = q.unsqueeze(1), topk_indices.unsqueeze(1)
        extra_topk_indices = None if extra_topk_indices is None else extra_topk_indices.unsqueeze(1)
    check_arguments(q, layout, value_dim, attn_sink)
    check_scope("", q, kv_cache, topk_indices, topk_length, layout, block_size)
    check_extra_scope(
        q, extra_kv_cache, extra_topk_indices, extra_topk_length, layout, extra_block_size
    )
    out, lse = torch.ops.model1.sparse_decode(
        q, kv_cache, topk_indices, topk_length,
        extra_kv_cache, extra_topk_indices, extra_topk_length, attn_sink,
        layout.name, layout.d_nope, layout.d_rope, block_size, extra_block_size or 1,
        value_dim, softmax_scale, empty_lse, deterministic,
        choose_backend(
            SPARSE_DECODE, backend, q, topk_indices, extra_topk_indices, layout, value_dim,
            softmax_scale, deterministic,
        ),
    )  # fmt: skip
    return (out.squeeze(1), lse.squeeze(1)) if is_flat else (out, lse)


@torch.library.custom_op("model1::sparse_decode", mutates_args=())
def _sparse_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    topk_length: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_topk_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    layout: str,
    d_nope: int,
    d_rope: int,
    block_size: int,
    extra_block_size: int,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return SPARSE_DECODE.load(backend)(
        q, kv_cache, topk_indices,
        topk_length=topk_length, extra_kv_cache=extra_kv_cache,
        extra_topk_indices=extra_topk_indices, extra_topk_length=extra_topk_length,
        attn_sink=attn_sink, layout=KVLayout(layout, d_nope, d_rope),  # pyright: ignore
        block_size=block_size, extra_block_size=extra_block_size, value_dim=value_dim,
        softmax_scale=softmax_scale, empty_lse=empty_lse, deterministic=deterministic,
    )  # fmt: skip


@_sparse_decode.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    b, s_q, h, _ = q.shape
    value_dim = args[12]
    assert isinstance(value_dim, int)
    return q.new_empty(b, s_q, h, value_dim), q.new_empty(b, s_q, h, dtype=torch.float32)

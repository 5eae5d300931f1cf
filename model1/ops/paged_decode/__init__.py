"""Paged decode: each query attends to every cached token of its request, found by a block table.

The operator of the public `flash_mla_with_kvcache` without `indices`, and without its
restrictions: any head counts, any block size, 8-bit caches, ragged query lengths. Values are the
first channels of the keys, so that every cached token is read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly
from model1.ops.kv_cache import KVLayout
from model1.ops.paged_decode.checks import check_paged_cache, check_query
from model1.ops.paged_decode.choice import choose_backend

PAGED_DECODE = Operator(
    name="paged_decode",
    implementations={
        "ref": "model1.ops.paged_decode.ref:paged_decode_ref",
        "triton": "model1.ops.paged_decode.portable:paged_decode_triton",
        "hopper": "model1.ops.paged_decode.hopper:paged_decode_hopper",
    },
)


def paged_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    value_dim: int,
    softmax_scale: float,
    causal: bool = False,
    layout: KVLayout | None = None,
    block_size: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    attn_sink: Tensor | None = None,
    empty_lse: float = -math.inf,
    deterministic: bool = False,
    is_checked: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the first `cache_seqlens[i]` tokens of its request i.

    out[i, j, h] = sum_s e^p_s v_s / (sum_s e^p_s + e^attn_sink[h]),  p_s = softmax_scale q . k_s
    lse[i, j, h] = ln sum_s e^p_s

    k_s is token s of the request, v_s its first `value_dim` channels. With causal the queries are
    the request's last tokens: query j of s_q sees s < cache_seqlens[i] - (s_q - 1 - j).

    q: [b, s_q, h, d] bf16, fp16 or fp32; or ragged, [t, h, d] with cu_seqlens_q [b + 1] int32 and
    its longest request max_seqlen_q, checked on the CPU (tokens that no request owns get undefined
    results). kv_cache, layout None: [num_blocks, block_size, hkv, d] of q's dtype, head j of q
    reads head j // (h / hkv); any strides but for a contiguous last axis. kv_cache with a layout:
    uint8 [num_blocks, block bytes] as `allocate_kv_cache` makes it, blocks of `block_size` tokens,
    hkv = 1; keys are dequantised and rounded to q's dtype. block_table: [b, max_blocks] int32;
    entries past a request's last block may hold anything. cache_seqlens: [b] int32; keys past the
    table do not exist. attn_sink: [h] fp32 natural-log logit, +-inf allowed, part of no lse.

    Returns out like q with `value_dim` channels and lse, one axis less, fp32. A row without keys
    gives out = 0, lse = empty_lse. Tokens past cache_seqlens may hold anything, NaN included. A NaN
    before it reaches the queries that see it, and may reach others of its request. A block id,
    -1 included, that stands for tokens and is outside the cache is undefined on a GPU and a
    ValueError on the CPU.
    is_checked: the caller vouches for the arguments, which are not looked at then.
    deterministic: a row's bits do not depend on its batch mates or on the table's width. Not
    differentiable. Raises ValueError for shapes, dtypes, devices and strides, BackendUnavailable
    for a backend that cannot run here. triton takes at most 1088 channels (on GPUs with 99 KB of
    shared memory 1024, in fp32 768).
    Source: the public FlashMLA interface; docs/kv_layout.md for the bytes.
    """
    if not is_checked:
        check_query(q, cache_seqlens, cu_seqlens_q, max_seqlen_q, attn_sink)
        check_paged_cache(q, kv_cache, block_table, cache_seqlens, layout, block_size, value_dim)
    size = block_size or kv_cache.shape[1]
    name = choose_backend(
        PAGED_DECODE, backend, q, kv_cache, cu_seqlens_q, layout, value_dim, softmax_scale, causal,
        deterministic,
    )  # fmt: skip
    if calls_ref_directly(name):
        return PAGED_DECODE.load(name)(
            q, kv_cache, block_table, cache_seqlens, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q or 0, attn_sink=attn_sink, layout=layout, block_size=size,
            value_dim=value_dim, softmax_scale=softmax_scale, causal=causal, empty_lse=empty_lse,
            deterministic=deterministic,
        )  # fmt: skip
    return torch.ops.model1.paged_decode(
        q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, attn_sink,
        None if layout is None else layout.name, 0 if layout is None else layout.d_nope,
        0 if layout is None else layout.d_rope, size, max_seqlen_q or 0, value_dim,
        softmax_scale, causal, empty_lse, deterministic, name,
    )  # fmt: skip


@torch.library.custom_op("model1::paged_decode", mutates_args=())
def _paged_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    attn_sink: Tensor | None,
    layout: str | None,
    d_nope: int,
    d_rope: int,
    block_size: int,
    max_seqlen_q: int,
    value_dim: int,
    softmax_scale: float,
    causal: bool,
    empty_lse: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return PAGED_DECODE.load(backend)(
        q, kv_cache, block_table, cache_seqlens,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, attn_sink=attn_sink,
        layout=None if layout is None else KVLayout(layout, d_nope, d_rope),  # pyright: ignore
        block_size=block_size, value_dim=value_dim, softmax_scale=softmax_scale, causal=causal,
        empty_lse=empty_lse, deterministic=deterministic,
    )  # fmt: skip


@_paged_decode.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    value_dim = args[10]
    assert isinstance(value_dim, int)
    out = q.new_empty(*q.shape[:-1], value_dim)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)

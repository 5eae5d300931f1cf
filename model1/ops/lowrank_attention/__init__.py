"""Token-level sparse attention over paged caches: exact core, low-rank rest, one softmax.

The composite that an engine step calls per layer. A low-rank scan chooses each row's core
(`lowrank_topk`), the core is attended exactly (`sparse_decode`), all other visible tokens through
their r projected channels (`lowrank_remainder`), and both results become one softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly
from model1.ops.kv_cache import KVLayout
from model1.ops.lowrank_attention.checks import check_arguments

LOWRANK_ATTENTION = Operator(
    name="lowrank_attention",
    implementations={
        "ref": "model1.ops.lowrank_attention.ref:lowrank_attention_ref",
        "triton": "model1.ops.lowrank_attention.portable:lowrank_attention_triton",
    },
)


def lowrank_attention(
    q: Tensor,
    kv_cache: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    key_end: Tensor,
    core_count: Tensor,
    basis: Tensor,
    mean: Tensor,
    *,
    topk: int,
    sliding_window: int,
    max_seqlen: int,
    rotary_value: bool,
    layout: KVLayout,
    block_size: int,
    value_dim: int,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    deterministic: bool = False,
    is_checked: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sparse attention of every query row over the first key_end[i] cached tokens of its request.

    s_j = scale q . k_j on the core S,  scale q . [basis^T z_j + mean, k_rope_j] on the rest
    D = sum_j e^(s_j) + e^(attn_sink[h]),  lse = ln sum_j e^(s_j),  j over all visible tokens
    out = (sum_S e^(s_j) v_j + sum_rest e^(s_j) [basis^T z_j + mean, k_rope_j]) / D

    S is what `lowrank_topk` chooses for the row. q: [t, h, d_nope + d_rope] bf16, fp16 or fp32, any
    strides with a contiguous last axis; rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1] belong to
    request i (int32 [b + 1], from 0 to t; at most max_seqlen_q rows each). kv_cache: uint8 blocks
    of `layout`; index_cache: [num_slots, r] bf16 or fp32, z of each slot; block_table: [b,
    max_blocks] int32. key_end: [t] int32, row i sees positions below it, at most max_seqlen;
    core_count: [t] int32, size of its core, at most topk and at least its visible part of
    `sliding_window`. basis: [r, d_nope], mean: [d_nope], floating point. attn_sink: [h] fp32, +-inf
    allowed. The value is the latent: value_dim = d_nope, with `rotary_value` d_nope + d_rope.

    Returns out [t, h, value_dim] in q's dtype and lse [t, h] fp32, the sink left out. A row with
    key_end <= 0 gives out = 0, lse = -inf. Positions that no row of the request sees may hold
    anything, NaN included; a NaN before may reach all rows of its request. The result is that of
    dense attention where the core holds all visible tokens and, but for roundings of z, with an
    orthonormal basis of rank d_nope. deterministic: a row's bits do not depend on its batch mates.
    is_checked: the caller vouches for the arguments, which are not looked at then.
    Not differentiable. Raises ValueError and BackendUnavailable as `lowrank_topk` does.
    The formula is ours, see docs/architecture.md; DeepSeek-V3.2 has the core alone.
    """
    if not is_checked:
        check_arguments(
            q, kv_cache, index_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end, core_count,
            basis, mean, attn_sink, topk=topk, sliding_window=sliding_window, max_seqlen=max_seqlen,
            value_dim=value_dim, rotary_value=rotary_value, layout=layout, block_size=block_size,
        )  # fmt: skip
    name = LOWRANK_ATTENTION.resolve(backend, q.device)
    run = _run if calls_ref_directly(name) else torch.ops.model1.lowrank_attention
    return run(
        q, kv_cache, index_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end, core_count,
        basis.detach(), mean.detach(), attn_sink, topk, sliding_window, max_seqlen, rotary_value,
        layout.name, layout.d_nope, layout.d_rope, block_size, value_dim, softmax_scale,
        deterministic, name,
    )  # fmt: skip


def _run(
    q: Tensor, kv_cache: Tensor, index_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, key_end: Tensor, core_count: Tensor, basis: Tensor, mean: Tensor,
    attn_sink: Tensor | None, topk: int, sliding_window: int, max_seqlen: int, rotary_value: bool,
    layout: str, d_nope: int, d_rope: int, block_size: int, value_dim: int, softmax_scale: float,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return LOWRANK_ATTENTION.load(backend)(
        q, kv_cache, index_cache, block_table, cu_seqlens_q, max_seqlen_q, key_end, core_count,
        basis, mean, topk=topk, sliding_window=sliding_window, max_seqlen=max_seqlen,
        rotary_value=rotary_value, layout=KVLayout(layout, d_nope, d_rope),  # pyright: ignore
        block_size=block_size, value_dim=value_dim, softmax_scale=softmax_scale,
        attn_sink=attn_sink, deterministic=deterministic,
    )  # fmt: skip


@torch.library.custom_op("model1::lowrank_attention", mutates_args=())(_run).register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    value_dim = args[18]
    assert isinstance(value_dim, int)
    return q.new_empty(*q.shape[:2], value_dim), q.new_empty(q.shape[:2], dtype=torch.float32)

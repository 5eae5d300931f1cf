# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
# pyright: reportPossiblyUnboundVariable=none
"""Sparse prefill backward on Hopper: one program per query and 64 heads.

With X = [q; dout] in shared memory a block of 64 keys k takes k X^T (logits and dp), ds k (its part
of dq) and W^T X with W = [ds; p] (the gradient of its rows, added to dkv). Keys are free when the
second product is done: the next ones come while the third runs. Rows of X are in groups of 32
heads, q, dout, q, dout, so that a warp group finds logits and dp of the same heads in one product.
docs/kernels_hopper.md has budgets and reasons.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from model1.ops.hopper.attend import tile_layout
from model1.ops.sparse_prefill.hopper_backward_tiles import (
    GROUP,
    HEADS,
    KEYS,
    ROPE,
    VALUES,
    copy_heads,
    copy_keys,
    copy_layout,
    finish_block,
    issue_scores,
    load_indices,
    product_layout,
    start_block,
    store_queries,
    weights,
)

_SIZES = [
    "stride_dt", "stride_dh", "stride_qt", "stride_qh", "stride_kv", "stride_topk", "first_row",
    "num_heads", "num_keys", "topk", "zero",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _sparse_attn_bwd_hopper_kernel(
    dout_ptr, q_ptr, kv_ptr, topk_indices_ptr, topk_length_ptr, log2_total_ptr, delta_ptr,
    dq_ptr, dkv_ptr,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kv, stride_topk,
    first_row, num_heads, num_keys, topk, softmax_scale, zero,
    D: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """dq of the queries from first_row on, and dkv or, if DETERMINISTIC, the pairs in its place.

    Strides of dout, q and kv count 8 numbers. zero: 0 at run time, since known indices would have
    every matrix descriptor computed ahead and spilled.
    """
    HAS_ROPE: gl.constexpr = D > VALUES
    S: gl.constexpr = product_layout(GROUP)
    COPIED: gl.constexpr = gl.SliceLayout(1, copy_layout())
    TILE: gl.constexpr = tile_layout(2)
    x = gl.allocate_shared_memory(gl.bfloat16, [1, 2 * HEADS, VALUES], TILE)
    k = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, VALUES], TILE)
    ds_tile = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, KEYS], TILE)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, KEYS], TILE)
    q_rope, k_rope = x, k
    if HAS_ROPE:
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROPE], TILE)
        k_rope = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, ROPE], TILE)
    num_tiles = (num_heads + HEADS - 1) // HEADS
    i = first_row + (gl.program_id(0) // num_tiles).to(gl.int64)
    first_head = (gl.program_id(0) % num_tiles) * HEADS
    length = topk
    if topk_length_ptr is not None:
        length = gl.minimum(gl.load(topk_length_ptr + i), topk)
    entries = topk_indices_ptr + i * stride_topk
    dkv = dkv_ptr
    if DETERMINISTIC:
        dkv += gl.program_id(0).to(gl.int64) * topk * D
    copy_heads(
        x.index(0), q_rope.index(0), q_ptr + i * stride_qt * 8, dout_ptr + i * stride_dt * 8,
        stride_qh, stride_dh, first_head, num_heads, HAS_ROPE,
    )  # fmt: skip
    index = load_indices(entries, 0, length, num_keys, COPIED)
    copy_keys(kv_ptr, stride_kv, index, k.index(0), k_rope.index(0), HAS_ROPE)
    index = load_indices(entries, KEYS, length, num_keys, COPIED)
    dq = gl.full([HEADS, VALUES], 0.0, gl.float32, layout=product_layout(128))
    dq_rope = dq
    if HAS_ROPE:
        dq_rope = gl.full([HEADS, ROPE], 0.0, gl.float32, layout=S)
    head = first_head + gl.arange(0, HEADS, layout=gl.SliceLayout(0, S))
    row = i * num_heads + head
    for start in range(0, length, KEYS):
        a = start * zero
        is_key = load_indices(entries, start, length, num_keys, gl.SliceLayout(1, S)) >= 0
        log2_total = gl.load(log2_total_ptr + row, mask=head < num_heads, other=0.0)
        delta = gl.load(delta_ptr + row, mask=head < num_heads, other=0.0)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        both, more = issue_scores(
            x.index(a), q_rope.index(a), k.index(a), k_rope.index(a), HAS_ROPE
        )
        if HAS_ROPE:
            both, more = warpgroup_mma_wait(0, deps=[both, more])
        else:
            both = warpgroup_mma_wait(0, deps=[both])
            more = both
        ds, p = weights(both, more, is_key, log2_total, delta, softmax_scale, HAS_ROPE)
        ds_tile.index(a).permute((1, 0)).store(ds)
        p_tile.index(a).permute((1, 0)).store(p)
        fence_async_shared()
        gl.thread_barrier()
        dq, dq_rope, rows = start_block(
            dq, dq_rope, ds_tile.index(a), p_tile.index(a), x.index(a), k.index(a),
            k_rope.index(a), HAS_ROPE,
        )  # fmt: skip
        gl.thread_barrier()  # all warps have multiplied with the keys
        copy_keys(kv_ptr, stride_kv, index, k.index(a), k_rope.index(a), HAS_ROPE)
        index = load_indices(entries, start + 2 * KEYS, length, num_keys, COPIED)
        finish_block(
            rows, ds_tile.index(a), p_tile.index(a), x.index(a), q_rope.index(a), dkv, entries,
            start, length, num_keys, D, DETERMINISTIC,
        )  # fmt: skip
    async_copy.wait_group(0)
    dq_rows = dq_ptr + i * num_heads * D
    store_queries(dq_rows, dq, first_head, num_heads, 0, D)
    if HAS_ROPE:
        store_queries(dq_rows, dq_rope, first_head, num_heads, VALUES, D)

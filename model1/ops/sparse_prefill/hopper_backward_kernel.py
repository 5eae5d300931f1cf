# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
# pyright: reportPossiblyUnboundVariable=none
"""Sparse prefill backward on Hopper: one program per query and 64 heads.

With X = [q; dout] in shared memory a block of 64 keys k takes k X^T (logits and dp), ds k (its part
of dq) and W^T X with W = [ds; p] (the gradient of its rows, added to dkv). Keys are free when the
second product is done: the next ones come while the third runs. In one kernel four warps fetch keys
and weigh them while eight add what was weighed before, in the other eight do all of it in turns.
Rows of X are in groups of 32 heads, q, dout, q, dout, so that a warp group finds logits and dp of
the same heads in one product. docs/kernels_hopper.md has budgets and reasons.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model1.ops.hopper.attend import tile_layout

_KEYS = gl.constexpr(64)  # of a block
_HEADS = gl.constexpr(64)  # of a program
_GROUP = gl.constexpr(32)  # heads of a warp group's scores
_VALUES = gl.constexpr(512)  # channels of dout
_ROPE = gl.constexpr(64)  # channels behind them, where rows have such
_LOG2_E = gl.constexpr(1.4426950408889634)
_SIZES = [
    "stride_dt", "stride_dh", "stride_qt", "stride_qh", "stride_kv", "stride_topk", "first_row",
    "num_heads", "num_keys", "topk", "zero",
]  # fmt: skip


@gluon.constexpr_function
def _product_layout(n, warps):
    """64 rows in products of n columns, for four warps or, in turns, for twice four."""
    return gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, n, 16])


@gluon.constexpr_function
def _copy_layout(warps):
    """Rows x channels, 16 bytes a lane, eight lanes to 128 bytes of a row."""
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _row_layout(n):
    """64 keys x 2n channels as `_product_layout` gives them to warps; eight lanes have 128 bytes.

    Only lanes of one warp exchange what they have, and four rows are added at once.
    """
    in_lane = [[0, 1], [0, 2]] + [[0, 1 << i] for i in range(4, n.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*in_lane, [8, 0]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, n]],
        block_bases=[],
        shape=[64, 2 * n],
    )


@gluon.jit
def _copy(rows, exists, tile, FIRST: gl.constexpr, NUM: gl.constexpr, WARPS: gl.constexpr):
    """Start copying NUM channels of `rows` from FIRST on; zeros where no row exists."""
    channel = gl.arange(0, NUM, layout=gl.SliceLayout(0, _copy_layout(WARPS)))[None, :] + FIRST
    async_copy.async_copy_global_to_shared(tile, rows[:, None] + channel, mask=exists[:, None])


@gluon.jit
def _copy_heads(
    x, q_rope, q_row, dout_row, stride_qh, stride_dh, first_head, num_heads,
    WARPS: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """Start copying X, and q's rotary channels."""
    ROW: gl.constexpr = gl.SliceLayout(1, _copy_layout(WARPS))
    for i in gl.static_range(2):
        head = first_head + i * _GROUP + gl.arange(0, _GROUP, layout=ROW)
        exists = head < num_heads
        head = head.to(gl.int64) * 8
        tile = x.slice(2 * i * _GROUP, _GROUP)
        _copy(q_row + head * stride_qh, exists, tile, 0, _VALUES, WARPS)
        tile = x.slice((2 * i + 1) * _GROUP, _GROUP)
        _copy(dout_row + head * stride_dh, exists, tile, 0, _VALUES, WARPS)
    if HAS_ROPE:
        head = first_head + gl.arange(0, _HEADS, layout=ROW)
        exists = head < num_heads
        _copy(q_row + head.to(gl.int64) * 8 * stride_qh, exists, q_rope, _VALUES, _ROPE, WARPS)


@gluon.jit
def _load_indices(entries, start, length, num_keys, LAYOUT: gl.constexpr):
    """Entries of a block of a list, -1 where none is valid."""
    position = start + gl.arange(0, _KEYS, layout=LAYOUT)
    index = gl.load(entries + position, mask=position < length, other=-1)
    return gl.where((index >= 0) & (index < num_keys), index, -1)


@gluon.jit
def _copy_keys(
    kv_ptr, stride_kv, index, k, k_rope, WARPS: gl.constexpr, HAS_ROPE: gl.constexpr
):
    """Start copying the rows of `index`; the group is committed."""
    rows = kv_ptr + gl.maximum(index, 0).to(gl.int64) * stride_kv * 8
    _copy(rows, index >= 0, k, 0, _VALUES, WARPS)
    if HAS_ROPE:
        _copy(rows, index >= 0, k_rope, _VALUES, _ROPE, WARPS)
    async_copy.commit_group()


@gluon.jit
def _issue_scores(
    x, q_rope, k, k_rope, FIRST: gl.constexpr, NUM: gl.constexpr, WARPS: gl.constexpr,
    HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """Products of keys with NUM rows of X from FIRST on, and with q's rotary channels."""
    LAYOUT: gl.constexpr = _product_layout(2 * _GROUP, WARPS)
    both = gl.full([_KEYS, NUM], 0.0, gl.float32, layout=LAYOUT)
    b = x.slice(FIRST, NUM).permute((1, 0))
    both = warpgroup_mma(k, b, both, use_acc=False, is_async=True)
    more = both
    if HAS_ROPE:
        S: gl.constexpr = _product_layout(_GROUP, WARPS)
        more = gl.full([_KEYS, NUM // 2], 0.0, gl.float32, layout=S)
        b = q_rope.slice(FIRST // 2, NUM // 2).permute((1, 0))
        more = warpgroup_mma(k_rope, b, more, use_acc=False, is_async=True)
    return both, more


@gluon.jit
def _weights(
    both, more, is_key, log2_total, delta, softmax_scale, NUM: gl.constexpr, WARPS: gl.constexpr,
    HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """ds and p, [keys, heads] bf16, from what `_issue_scores` has computed for NUM heads."""
    S: gl.constexpr = _product_layout(_GROUP, WARPS)
    both = gl.reshape(both, [_KEYS, NUM // _GROUP, 2, _GROUP])
    s, dp = gl.split(gl.permute(both, [0, 1, 3, 2]))
    s = gl.convert_layout(gl.reshape(s, [_KEYS, NUM]), S, assert_trivial=True)
    dp = gl.convert_layout(gl.reshape(dp, [_KEYS, NUM]), S, assert_trivial=True)
    if HAS_ROPE:
        s += more
    p = gl.exp2(s * (softmax_scale * _LOG2_E) - log2_total[None, :])
    p = gl.where(is_key[:, None], p, 0.0)
    ds = p * (dp - delta[None, :]) * softmax_scale
    return ds.to(gl.bfloat16), p.to(gl.bfloat16)


@gluon.jit
def _issue_rows(ds, p, x, C: gl.constexpr, PIECE: gl.constexpr):
    """Piece C of the gradient of the keys' rows, four products, to be waited for."""
    rows = gl.full([_KEYS, PIECE], 0.0, gl.float32, layout=_product_layout(PIECE // 2, 8))
    for i in gl.static_range(2):
        a = ds.slice(i * _GROUP, _GROUP).permute((1, 0))
        b = x.slice(2 * i * _GROUP, _GROUP).slice(C * PIECE, PIECE, dim=1)
        rows = warpgroup_mma(a, b, rows, use_acc=i > 0, is_async=True)
        a = p.slice(i * _GROUP, _GROUP).permute((1, 0))
        b = x.slice((2 * i + 1) * _GROUP, _GROUP).slice(C * PIECE, PIECE, dim=1)
        rows = warpgroup_mma(a, b, rows, is_async=True)
    return rows


@gluon.jit
def _issue_rope_rows(ds, q_rope):
    """The rotary channels of the gradient of the keys' rows, to be waited for."""
    rows = gl.full([_KEYS, _ROPE], 0.0, gl.float32, layout=_product_layout(_ROPE // 2, 8))
    return warpgroup_mma(ds.permute((1, 0)), q_rope, rows, use_acc=False, is_async=True)


@gluon.jit
def _add_rows(
    rows, dkv, index, place, FIRST: gl.constexpr, NUM: gl.constexpr, D: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Add NUM channels from FIRST on to the rows `index` or, if DETERMINISTIC, write the pairs."""
    LAYOUT: gl.constexpr = _row_layout(NUM // 2)
    index = gl.convert_layout(index, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    channel = gl.arange(0, NUM, layout=gl.SliceLayout(0, LAYOUT))[None, :] + FIRST
    values = gl.convert_layout(rows, LAYOUT)
    mask = (index >= 0)[:, None] & (channel >= 0)
    if DETERMINISTIC:
        place += gl.arange(0, _KEYS, layout=gl.SliceLayout(1, LAYOUT))
        gl.store(dkv + place.to(gl.int64)[:, None] * D + channel, values, mask=mask)
    else:
        at = dkv + gl.maximum(index, 0).to(gl.int64)[:, None] * D + channel
        gl.atomic_add(at, values, mask=mask, sem="relaxed")


@gluon.jit
def _start_block(
    dq, dq_rope, ds, p, x, k, k_rope, PIECE: gl.constexpr, HAS_ROPE: gl.constexpr
):
    """dq with the part of a block of keys, which this reads last; piece 0 of their gradient."""
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    if HAS_ROPE:
        dq_rope = warpgroup_mma(ds, k_rope, dq_rope, is_async=True)
    rows = _issue_rows(ds, p, x, 0, PIECE)
    if HAS_ROPE:
        dq, dq_rope = warpgroup_mma_wait(4, deps=[dq, dq_rope])
    else:
        dq = warpgroup_mma_wait(4, deps=[dq])
        dq_rope = dq
    return dq, dq_rope, rows


@gluon.jit
def _finish_block(
    rows, ds, p, x, q_rope, dkv, entries, start, length, num_keys, w_free,
    D: gl.constexpr, DETERMINISTIC: gl.constexpr, PIECE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Compute and add the gradient of a block's rows, of which piece 0 has been issued.

    w_free: a barrier, arrived at when ds and p have been read, or a number where there is none.
    """
    HAS_ROPE: gl.constexpr = D > _VALUES
    HAS_BARRIER: gl.constexpr = isinstance(w_free, gl.shared_memory_descriptor)
    NUM_PIECES: gl.constexpr = _VALUES // PIECE
    ROW: gl.constexpr = gl.SliceLayout(1, _row_layout(PIECE // 2))
    index = _load_indices(entries, start, length, num_keys, ROW)
    for c in gl.static_range(NUM_PIECES):
        done = warpgroup_mma_wait(0, deps=[rows])
        if AHEAD and c + 1 < NUM_PIECES:
            rows = _issue_rows(ds, p, x, c + 1, PIECE)
        if HAS_BARRIER and c + 1 == NUM_PIECES and not HAS_ROPE:
            mbarrier.arrive(w_free, count=1)
        _add_rows(done, dkv, index, start, c * PIECE, PIECE, D, DETERMINISTIC)
        if not AHEAD and c + 1 < NUM_PIECES:
            rows = _issue_rows(ds, p, x, c + 1, PIECE)
    if HAS_ROPE:
        rope_rows = _issue_rope_rows(ds, q_rope)
        rope_rows = warpgroup_mma_wait(0, deps=[rope_rows])
        if HAS_BARRIER:
            mbarrier.arrive(w_free, count=1)
        _add_rows(rope_rows, dkv, index, start, _VALUES, _ROPE, D, DETERMINISTIC)


@gluon.jit
def _store_queries(dq_rows, dq, head, num_heads, FIRST: gl.constexpr, D: gl.constexpr):
    """Write channels from FIRST on of the gradient of heads from `head` on."""
    head += gl.arange(0, _HEADS, layout=gl.SliceLayout(1, dq.type.layout))
    channel = gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, dq.type.layout)) + FIRST
    at = dq_rows + head.to(gl.int64)[:, None] * D + channel[None, :]
    gl.store(at, dq.to(gl.bfloat16), mask=(head < num_heads)[:, None])


@gluon.jit
def _score_blocks(
    q_row, dout_row, stride_qh, stride_dh, kv_ptr, stride_kv, entries, length, num_keys,
    log2_totals, deltas, first_head, num_heads, softmax_scale, zero, row_sums, x, q_rope, k, k_rope,
    ds_tile, p_tile, w_ready, w_free, k_free, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """The four warps that copy X and keys and compute W, a block ahead of the others."""
    S: gl.constexpr = _product_layout(_GROUP, 4)
    COPIED: gl.constexpr = gl.SliceLayout(1, _copy_layout(4))
    HEAD: gl.constexpr = gl.SliceLayout(0, S)
    _copy_heads(
        x.index(0), q_rope.index(0), q_row, dout_row, stride_qh, stride_dh, first_head, num_heads,
        4, HAS_ROPE,
    )  # fmt: skip
    for i in gl.static_range(2):
        head = first_head + i * _GROUP + gl.arange(0, _GROUP, layout=HEAD)
        log2_total = gl.load(log2_totals + head, mask=head < num_heads, other=0.0)
        row_sums.index(2 * i).store(log2_total)
        delta = gl.load(deltas + head, mask=head < num_heads, other=0.0)
        row_sums.index(2 * i + 1).store(delta)
    index = _load_indices(entries, 0, length, num_keys, COPIED)
    for start in range(0, length, _KEYS):
        a = start * zero
        phase = (start // _KEYS) & 1
        mbarrier.wait(k_free.index(0), phase ^ 1)
        _copy_keys(kv_ptr, stride_kv, index, k.index(a), k_rope.index(a), 4, HAS_ROPE)
        index = _load_indices(entries, start + _KEYS, length, num_keys, COPIED)
        is_key = _load_indices(entries, start, length, num_keys, gl.SliceLayout(1, S)) >= 0
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        for i in gl.static_range(2):
            both, more = _issue_scores(
                x.index(a), q_rope.index(a), k.index(a), k_rope.index(a), 2 * i * _GROUP,
                2 * _GROUP, 4, HAS_ROPE,
            )  # fmt: skip
            if HAS_ROPE:
                both, more = warpgroup_mma_wait(0, deps=[both, more])
            else:
                both = warpgroup_mma_wait(0, deps=[both])
                more = both
            log2_total = row_sums.index(2 * i).load(HEAD)
            delta = row_sums.index(2 * i + 1).load(HEAD)
            ds, p = _weights(
                both, more, is_key, log2_total, delta, softmax_scale, _GROUP, 4, HAS_ROPE
            )
            if i == 0:  # the weights of the block before are being used until now
                mbarrier.wait(w_free.index(0), phase ^ 1)
            ds_tile.index(a).slice(i * _GROUP, _GROUP).permute((1, 0)).store(ds)
            p_tile.index(a).slice(i * _GROUP, _GROUP).permute((1, 0)).store(p)
        fence_async_shared()
        mbarrier.arrive(w_ready.index(0), count=1)
    async_copy.wait_group(0)


@gluon.jit
def _add_blocks(
    dq_rows, dkv, entries, length, num_keys, first_head, num_heads, zero, x, q_rope, k, k_rope,
    ds_tile, p_tile, w_ready, w_free, k_free,
    D: gl.constexpr, DETERMINISTIC: gl.constexpr, PIECE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The eight warps that compute dq and the gradients of the keys' rows."""
    HAS_ROPE: gl.constexpr = D > _VALUES
    dq = gl.full([_HEADS, _VALUES], 0.0, gl.float32, layout=_product_layout(128, 8))
    dq_rope = dq
    if HAS_ROPE:
        dq_rope = gl.full([_HEADS, _ROPE], 0.0, gl.float32, layout=_product_layout(_ROPE // 2, 8))
    for start in range(0, length, _KEYS):
        a = start * zero
        mbarrier.wait(w_ready.index(0), (start // _KEYS) & 1)
        dq, dq_rope, rows = _start_block(
            dq, dq_rope, ds_tile.index(a), p_tile.index(a), x.index(a), k.index(a),
            k_rope.index(a), PIECE, HAS_ROPE,
        )  # fmt: skip
        mbarrier.arrive(k_free.index(0), count=1)
        _finish_block(
            rows, ds_tile.index(a), p_tile.index(a), x.index(a), q_rope.index(a), dkv, entries,
            start, length, num_keys, w_free.index(0), D, DETERMINISTIC, PIECE, AHEAD,
        )  # fmt: skip
    _store_queries(dq_rows, dq, first_head, num_heads, 0, D)
    if HAS_ROPE:
        _store_queries(dq_rows, dq_rope, first_head, num_heads, _VALUES, D)


@gluon.jit(do_not_specialize=_SIZES)
def _sparse_attn_bwd_hopper_kernel(
    dout_ptr, q_ptr, kv_ptr, topk_indices_ptr, topk_length_ptr, log2_total_ptr, delta_ptr,
    dq_ptr, dkv_ptr,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kv, stride_topk,
    first_row, num_heads, num_keys, topk, softmax_scale, zero,
    D: gl.constexpr, DETERMINISTIC: gl.constexpr, PIECE: gl.constexpr, AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq of the queries from first_row on, and dkv or, if DETERMINISTIC, the pairs in its place.

    Strides of dout, q and kv count 8 numbers. zero: 0 at run time, since known indices would have
    every matrix descriptor computed ahead and spilled. PIECE channels of rows of dkv are computed
    at a time; AHEAD: the next piece while this one is added. REGISTERS: of the warps that add.
    """
    HAS_ROPE: gl.constexpr = D > _VALUES
    TILE: gl.constexpr = tile_layout(2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x = gl.allocate_shared_memory(gl.bfloat16, [1, 2 * _HEADS, _VALUES], TILE)
    k = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS, _VALUES], TILE)
    ds_tile = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _KEYS], TILE)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _KEYS], TILE)
    q_rope, k_rope = x, k
    if HAS_ROPE:
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _ROPE], TILE)
        k_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS, _ROPE], TILE)
    # of 32 heads each: log2 of the denominator, sum(out dout), and the same of the other heads
    row_sums = gl.allocate_shared_memory(
        gl.float32, [4, _GROUP], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    w_ready = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    w_free = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    mbarrier.init(w_ready.index(0), count=1)
    mbarrier.init(w_free.index(0), count=1)
    mbarrier.init(k_free.index(0), count=1)
    num_tiles = (num_heads + _HEADS - 1) // _HEADS
    i = first_row + (gl.program_id(0) // num_tiles).to(gl.int64)
    first_head = (gl.program_id(0) % num_tiles) * _HEADS
    length = topk
    if topk_length_ptr is not None:
        length = gl.minimum(gl.load(topk_length_ptr + i), topk)
    entries = topk_indices_ptr + i * stride_topk
    dkv = dkv_ptr
    if DETERMINISTIC:
        dkv += gl.program_id(0).to(gl.int64) * topk * D
    gl.warp_specialize([
        (_score_blocks, (
            q_ptr + i * stride_qt * 8, dout_ptr + i * stride_dt * 8, stride_qh, stride_dh, kv_ptr,
            stride_kv, entries, length, num_keys, log2_total_ptr + i * num_heads,
            delta_ptr + i * num_heads, first_head, num_heads, softmax_scale, zero, row_sums, x,
            q_rope, k, k_rope, ds_tile, p_tile, w_ready, w_free, k_free, HAS_ROPE,
        )),
        (_add_blocks, (
            dq_ptr + i * num_heads * D, dkv, entries, length, num_keys, first_head, num_heads, zero,
            x, q_rope, k, k_rope, ds_tile, p_tile, w_ready, w_free, k_free,
            D, DETERMINISTIC, PIECE, AHEAD,
        )),
    ], [8], [REGISTERS])  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _sparse_attn_bwd_even_kernel(
    dout_ptr, q_ptr, kv_ptr, topk_indices_ptr, topk_length_ptr, log2_total_ptr, delta_ptr,
    dq_ptr, dkv_ptr,
    stride_dt, stride_dh, stride_qt, stride_qh, stride_kv, stride_topk,
    first_row, num_heads, num_keys, topk, softmax_scale, zero,
    D: gl.constexpr, DETERMINISTIC: gl.constexpr, PIECE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """`_sparse_attn_bwd_hopper_kernel` by eight warps that are all alike."""
    HAS_ROPE: gl.constexpr = D > _VALUES
    S: gl.constexpr = _product_layout(_GROUP, 8)
    COPIED: gl.constexpr = gl.SliceLayout(1, _copy_layout(8))
    TILE: gl.constexpr = tile_layout(2)
    x = gl.allocate_shared_memory(gl.bfloat16, [1, 2 * _HEADS, _VALUES], TILE)
    k = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS, _VALUES], TILE)
    ds_tile = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _KEYS], TILE)
    p_tile = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _KEYS], TILE)
    q_rope, k_rope = x, k
    if HAS_ROPE:
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _ROPE], TILE)
        k_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS, _ROPE], TILE)
    num_tiles = (num_heads + _HEADS - 1) // _HEADS
    i = first_row + (gl.program_id(0) // num_tiles).to(gl.int64)
    first_head = (gl.program_id(0) % num_tiles) * _HEADS
    length = topk
    if topk_length_ptr is not None:
        length = gl.minimum(gl.load(topk_length_ptr + i), topk)
    entries = topk_indices_ptr + i * stride_topk
    dkv = dkv_ptr
    if DETERMINISTIC:
        dkv += gl.program_id(0).to(gl.int64) * topk * D
    _copy_heads(
        x.index(0), q_rope.index(0), q_ptr + i * stride_qt * 8, dout_ptr + i * stride_dt * 8,
        stride_qh, stride_dh, first_head, num_heads, 8, HAS_ROPE,
    )  # fmt: skip
    index = _load_indices(entries, 0, length, num_keys, COPIED)
    _copy_keys(kv_ptr, stride_kv, index, k.index(0), k_rope.index(0), 8, HAS_ROPE)
    index = _load_indices(entries, _KEYS, length, num_keys, COPIED)
    dq = gl.full([_HEADS, _VALUES], 0.0, gl.float32, layout=_product_layout(128, 8))
    dq_rope = dq
    if HAS_ROPE:
        dq_rope = gl.full([_HEADS, _ROPE], 0.0, gl.float32, layout=S)
    head = first_head + gl.arange(0, _HEADS, layout=gl.SliceLayout(0, S))
    row = i * num_heads + head
    for start in range(0, length, _KEYS):
        a = start * zero
        is_key = _load_indices(entries, start, length, num_keys, gl.SliceLayout(1, S)) >= 0
        log2_total = gl.load(log2_total_ptr + row, mask=head < num_heads, other=0.0)
        delta = gl.load(delta_ptr + row, mask=head < num_heads, other=0.0)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        both, more = _issue_scores(
            x.index(a), q_rope.index(a), k.index(a), k_rope.index(a), 0, 2 * _HEADS, 8, HAS_ROPE
        )
        if HAS_ROPE:
            both, more = warpgroup_mma_wait(0, deps=[both, more])
        else:
            both = warpgroup_mma_wait(0, deps=[both])
            more = both
        ds, p = _weights(
            both, more, is_key, log2_total, delta, softmax_scale, _HEADS, 8, HAS_ROPE
        )
        ds_tile.index(a).permute((1, 0)).store(ds)
        p_tile.index(a).permute((1, 0)).store(p)
        fence_async_shared()
        gl.thread_barrier()
        dq, dq_rope, rows = _start_block(
            dq, dq_rope, ds_tile.index(a), p_tile.index(a), x.index(a), k.index(a),
            k_rope.index(a), PIECE, HAS_ROPE,
        )  # fmt: skip
        gl.thread_barrier()  # all warps have multiplied with the keys
        _copy_keys(kv_ptr, stride_kv, index, k.index(a), k_rope.index(a), 8, HAS_ROPE)
        index = _load_indices(entries, start + 2 * _KEYS, length, num_keys, COPIED)
        _finish_block(
            rows, ds_tile.index(a), p_tile.index(a), x.index(a), q_rope.index(a), dkv, entries,
            start, length, num_keys, zero, D, DETERMINISTIC, PIECE, AHEAD,
        )  # fmt: skip
    async_copy.wait_group(0)
    dq_rows = dq_ptr + i * num_heads * D
    _store_queries(dq_rows, dq, first_head, num_heads, 0, D)
    if HAS_ROPE:
        _store_queries(dq_rows, dq_rope, first_head, num_heads, _VALUES, D)

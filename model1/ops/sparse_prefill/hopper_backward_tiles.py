# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
# pyright: reportPossiblyUnboundVariable=none
"""What the backward kernel of sparse prefill on Hopper does with a block of keys."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

KEYS = gl.constexpr(64)  # of a block
HEADS = gl.constexpr(64)  # of a program
GROUP = gl.constexpr(32)  # heads of a warp group's scores
PIECE = gl.constexpr(128)  # channels of the gradient of keys that are computed at a time
VALUES = gl.constexpr(512)  # channels of dout
ROPE = gl.constexpr(64)  # channels behind them, where rows have such
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def product_layout(n):
    """64 rows in products of n columns, which two warp groups take in turns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, n, 16])


@gluon.constexpr_function
def copy_layout():
    """Rows x channels, 16 bytes a lane, eight lanes to 128 bytes of a row."""
    return gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])


@gluon.constexpr_function
def _row_layout(n, wide):
    """64 keys x 2n channels as `product_layout` gives them to warps, four channels a lane together.

    Sixteen of a row are in neighbouring lanes, or 32 if `wide`, which are a line of the L2 cache.
    """
    in_lane = [[0, 1], [0, 2]] + [[0, 1 << i] for i in range(4, n.bit_length() - 1)]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    if wide:
        in_lane[2], lanes[4] = lanes[4], in_lane[2]
    return gl.DistributedLinearLayout(
        reg_bases=[*in_lane, [8, 0]],
        lane_bases=lanes,
        warp_bases=[[16, 0], [32, 0], [0, n]],
        block_bases=[],
        shape=[64, 2 * n],
    )


@gluon.jit
def _copy(rows, exists, tile, FIRST: gl.constexpr, NUM: gl.constexpr):
    """Start copying NUM channels of `rows` from FIRST on; zeros where no row exists."""
    channel = gl.arange(0, NUM, layout=gl.SliceLayout(0, copy_layout()))[None, :] + FIRST
    async_copy.async_copy_global_to_shared(tile, rows[:, None] + channel, mask=exists[:, None])


@gluon.jit
def copy_heads(
    x, q_rope, q_row, dout_row, stride_qh, stride_dh, first_head, num_heads, HAS_ROPE: gl.constexpr
):  # fmt: skip
    """Start copying X, and q's rotary channels; the group is committed."""
    ROW: gl.constexpr = gl.SliceLayout(1, copy_layout())
    for i in gl.static_range(2):
        head = first_head + i * GROUP + gl.arange(0, GROUP, layout=ROW)
        exists = head < num_heads
        head = head.to(gl.int64) * 8
        tile = x.slice(2 * i * GROUP, GROUP)
        _copy(q_row + head * stride_qh, exists, tile, 0, VALUES)
        tile = x.slice((2 * i + 1) * GROUP, GROUP)
        _copy(dout_row + head * stride_dh, exists, tile, 0, VALUES)
    if HAS_ROPE:
        head = first_head + gl.arange(0, HEADS, layout=ROW)
        exists = head < num_heads
        _copy(q_row + head.to(gl.int64) * 8 * stride_qh, exists, q_rope, VALUES, ROPE)
    async_copy.commit_group()


@gluon.jit
def load_indices(entries, start, length, num_keys, LAYOUT: gl.constexpr):
    """Entries of a block of a list, -1 where none is valid."""
    position = start + gl.arange(0, KEYS, layout=LAYOUT)
    index = gl.load(entries + position, mask=position < length, other=-1)
    return gl.where((index >= 0) & (index < num_keys), index, -1)


@gluon.jit
def copy_keys(kv_ptr, stride_kv, index, k, k_rope, HAS_ROPE: gl.constexpr):
    """Start copying the rows of `index`; the group is committed."""
    rows = kv_ptr + gl.maximum(index, 0).to(gl.int64) * stride_kv * 8
    _copy(rows, index >= 0, k, 0, VALUES)
    if HAS_ROPE:
        _copy(rows, index >= 0, k_rope, VALUES, ROPE)
    async_copy.commit_group()


@gluon.jit
def issue_scores(x, q_rope, k, k_rope, HAS_ROPE: gl.constexpr):
    """Products of keys with X, and with q's rotary channels."""
    both = gl.full([KEYS, 2 * HEADS], 0.0, gl.float32, layout=product_layout(2 * GROUP))
    both = warpgroup_mma(k, x.permute((1, 0)), both, use_acc=False, is_async=True)
    more = both
    if HAS_ROPE:
        more = gl.full([KEYS, HEADS], 0.0, gl.float32, layout=product_layout(GROUP))
        more = warpgroup_mma(k_rope, q_rope.permute((1, 0)), more, use_acc=False, is_async=True)
    return both, more


@gluon.jit
def weights(both, more, is_key, log2_total, delta, softmax_scale, HAS_ROPE: gl.constexpr):
    """ds and p, [keys, heads] bf16, from what `issue_scores` has computed."""
    S: gl.constexpr = product_layout(GROUP)
    both = gl.reshape(both, [KEYS, HEADS // GROUP, 2, GROUP])
    s, dp = gl.split(gl.permute(both, [0, 1, 3, 2]))
    s = gl.convert_layout(gl.reshape(s, [KEYS, HEADS]), S, assert_trivial=True)
    dp = gl.convert_layout(gl.reshape(dp, [KEYS, HEADS]), S, assert_trivial=True)
    if HAS_ROPE:
        s += more
    p = gl.exp2(s * (softmax_scale * _LOG2_E) - log2_total[None, :])
    p = gl.where(is_key[:, None], p, 0.0)
    ds = p * (dp - delta[None, :]) * softmax_scale
    return ds.to(gl.bfloat16), p.to(gl.bfloat16)


@gluon.jit
def _issue_rows(ds, p, x, C: gl.constexpr):
    """Piece C of the gradient of the keys' rows, four products, to be waited for."""
    rows = gl.full([KEYS, PIECE], 0.0, gl.float32, layout=product_layout(PIECE // 2))
    for i in gl.static_range(2):
        a = ds.slice(i * GROUP, GROUP).permute((1, 0))
        b = x.slice(2 * i * GROUP, GROUP).slice(C * PIECE, PIECE, dim=1)
        rows = warpgroup_mma(a, b, rows, use_acc=i > 0, is_async=True)
        a = p.slice(i * GROUP, GROUP).permute((1, 0))
        b = x.slice((2 * i + 1) * GROUP, GROUP).slice(C * PIECE, PIECE, dim=1)
        rows = warpgroup_mma(a, b, rows, is_async=True)
    return rows


@gluon.jit
def _issue_rope_rows(ds, q_rope):
    """The rotary channels of the gradient of the keys' rows, to be waited for."""
    rows = gl.full([KEYS, ROPE], 0.0, gl.float32, layout=product_layout(ROPE // 2))
    return warpgroup_mma(ds.permute((1, 0)), q_rope, rows, use_acc=False, is_async=True)


@gluon.jit
def _add_rows(
    rows, dkv, index, place, FIRST: gl.constexpr, NUM: gl.constexpr, D: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Add NUM channels from FIRST on to the rows `index` or, if DETERMINISTIC, write the pairs."""
    LAYOUT: gl.constexpr = _row_layout(NUM // 2, True)
    index = gl.convert_layout(index, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    channel = gl.arange(0, NUM, layout=gl.SliceLayout(0, LAYOUT))[None, :] + FIRST
    # lanes exchange halves twice; in one step the compiler would go through shared memory, and it
    # makes one step of two that nothing separates
    values = gl.convert_layout(rows, _row_layout(NUM // 2, False))
    values = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=gl.float32, is_pure=True, pack=1
    )
    values = gl.convert_layout(values, LAYOUT)
    mask = (index >= 0)[:, None] & (channel >= 0)
    if DETERMINISTIC:
        place += gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
        gl.store(dkv + place.to(gl.int64)[:, None] * D + channel, values, mask=mask)
        gl.thread_barrier()  # or the compiler puts stores off until registers spill
    else:
        at = dkv + gl.maximum(index, 0).to(gl.int64)[:, None] * D + channel
        gl.atomic_add(at, values, mask=mask, sem="relaxed")


@gluon.jit
def start_block(dq, dq_rope, ds, p, x, k, k_rope, HAS_ROPE: gl.constexpr):
    """dq with the part of a block of keys, which this reads last; piece 0 of their gradient."""
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    if HAS_ROPE:
        dq_rope = warpgroup_mma(ds, k_rope, dq_rope, is_async=True)
    rows = _issue_rows(ds, p, x, 0)
    if HAS_ROPE:
        dq, dq_rope = warpgroup_mma_wait(4, deps=[dq, dq_rope])
    else:
        dq = warpgroup_mma_wait(4, deps=[dq])
        dq_rope = dq
    return dq, dq_rope, rows


@gluon.jit
def finish_block(
    rows, ds, p, x, q_rope, dkv, entries, start, length, num_keys, D: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Compute and add the gradient of a block's rows, of which piece 0 has been issued."""
    NUM_PIECES: gl.constexpr = VALUES // PIECE
    ROW: gl.constexpr = gl.SliceLayout(1, _row_layout(PIECE // 2, True))
    index = load_indices(entries, start, length, num_keys, ROW)
    for c in gl.static_range(NUM_PIECES):
        rows = warpgroup_mma_wait(0, deps=[rows])
        _add_rows(rows, dkv, index, start, c * PIECE, PIECE, D, DETERMINISTIC)
        if c + 1 < NUM_PIECES:
            rows = _issue_rows(ds, p, x, c + 1)
    if D > VALUES:
        rope_rows = _issue_rope_rows(ds, q_rope)
        rope_rows = warpgroup_mma_wait(0, deps=[rope_rows])
        _add_rows(rope_rows, dkv, index, start, VALUES, ROPE, D, DETERMINISTIC)


@gluon.jit
def store_queries(dq_rows, dq, head, num_heads, FIRST: gl.constexpr, D: gl.constexpr):
    """Write channels from FIRST on of the gradient of heads from `head` on."""
    head += gl.arange(0, HEADS, layout=gl.SliceLayout(1, dq.type.layout))
    channel = gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, dq.type.layout)) + FIRST
    at = dq_rows + head.to(gl.int64)[:, None] * D + channel[None, :]
    gl.store(at, dq.to(gl.bfloat16), mask=(head < num_heads)[:, None])

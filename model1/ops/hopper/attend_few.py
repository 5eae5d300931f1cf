# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
# pyright: reportPossiblyUnboundVariable=none
"""The attending half for 8, 16 or 32 heads: keys and channels on rows, heads on columns.

A matrix product has 64 rows, whatever the number of heads; its columns may be as few as 8. So
scores are k . q^T, [64 keys, heads], and results v^T . w^T, [256 channels, heads] of each of the
two warp groups; both read keys from where they lie. Roles and barriers are those of
`model1.ops.hopper.attend`, but for the output: it has tiles of its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from model1.ops.hopper.attend import HALF, fetch_queries, store_lse, tile_layout, with_sink
from model1.ops.hopper.items import item_field
from model1.ops.hopper.softmax import add_scores, first_scores, log2_sum

_ROWS = gl.constexpr(64)  # heads that a partial result has room for
_BLOCK = gl.constexpr(64)  # keys


@gluon.constexpr_function
def columns_layout(heads):
    """64 keys, or 256 channels, x heads: what a column's head is does not depend on the rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, heads, 16])


@gluon.jit
def softmax_columns(scores, largest, scale_log2):
    """`model1.ops.hopper.softmax.softmax_step` of [keys, heads]."""
    new_largest = gl.maximum(largest, gl.max(scores, 0) * scale_log2)
    # a head that has seen no key must not compute inf - inf
    shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    return gl.exp2(scores * scale_log2 - shift[None, :]), gl.exp2(largest - shift), new_largest


@gluon.jit
def _block_scores(
    tiles, low_ready, high_ready, phase, a, NUMBER: gl.constexpr, HAS_ROPE: gl.constexpr,
    IS_COPIED: gl.constexpr,
):  # fmt: skip
    """k . q^T, [64 keys, heads], of a pair's block NUMBER, with hidden keys at -inf."""
    q_low, q_high, q_rope, k_low, k_high, k_rope, bias = tiles
    L: gl.constexpr = columns_layout(q_low.shape[1])
    mbarrier.wait((low_ready if IS_COPIED else high_ready).index(NUMBER), phase)
    fence_async_shared()
    scores = first_scores(k_low.index(a + NUMBER), q_low.index(a), L)
    if IS_COPIED:
        mbarrier.wait(high_ready.index(NUMBER), phase)
        fence_async_shared()
    scores = add_scores(k_high.index(a + NUMBER), q_high.index(a), scores)
    if HAS_ROPE:
        scores = add_scores(k_rope.index(a + NUMBER), q_rope.index(a), scores)
    scores = warpgroup_mma_wait(0, deps=[scores])
    return scores + bias.index(NUMBER).load(gl.SliceLayout(1, L)).to(gl.float32)[:, None]


@gluon.jit
def _add_values(keys, weights, acc):
    """acc [256 channels, heads] plus keys^T . weights^T, of [64 keys, 256] and [heads, 64]."""
    acc = warpgroup_mma(keys.permute((1, 0)), weights.permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _hand_over(
    NUMBER: gl.constexpr, scores, largest, scale_log2, weights, decays, maxima, w_ready
):  # fmt: skip
    """The weights of a block, its factor and maximum, also to where both groups read them."""
    w, decay, largest = softmax_columns(scores, largest, scale_log2)
    weights.permute((1, 0)).store(w.to(gl.bfloat16))
    decays.index(NUMBER).store(decay)
    maxima.index(NUMBER).store(largest)
    fence_async_shared()
    # lets all warps of the group wait for each other: its own product reads these weights too
    mbarrier.arrive(w_ready.index(NUMBER), count=1)
    return w, decay, largest


@gluon.jit
def _finish(
    SIDE: gl.constexpr, acc, largest, weight_sums, totals, totals_ready, parity, out_tile, out_desc,
    request, query, slot, group, h, s_q, empty_lse, results, groups,
):  # fmt: skip
    """Write an item's half of the output, and its lse.

    weight_sums: [64, heads], for each place in a block the sum of the weights that this warp group
    computed. results: as in `model1.ops.hopper.attend`.
    """
    lse_ptr, max_ptr, sink_ptr, partial_ptr, partial_lse_ptr = results
    HEADS: gl.constexpr = out_tile.shape[1]
    L: gl.constexpr = columns_layout(HEADS)
    HEAD: gl.constexpr = gl.SliceLayout(0, L)
    # before other threads write where the output of the item before left from
    tma.store_wait(0)
    total = gl.sum(weight_sums, 0)
    totals.index(SIDE).store(total)
    mbarrier.arrive(totals_ready, count=1)
    mbarrier.wait(totals_ready, parity)
    total = total + totals.index(1 - SIDE).load(HEAD)
    lse, weight = log2_sum(largest, total)
    column = gl.arange(0, HEADS, layout=HEAD)
    head = group * HEADS + column
    if slot < 0:
        weight = with_sink(weight, total, lse, sink_ptr, head, h)
        out_tile.index(0).permute((1, 0)).store((acc * weight[None, :]).to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(
            out_desc, [request, query, group * HEADS, SIDE * HALF],
            out_tile.index(0)._reinterpret(gl.bfloat16, [1, 1, HEADS, HALF], tile_layout(4)),
        )  # fmt: skip
        if SIDE == 0:
            store_lse(
                lse, largest, total, head, request, query, h, s_q, empty_lse, lse_ptr, max_ptr
            )
    else:
        part = slot.to(gl.int64) * groups + group
        channel = gl.arange(0, HALF, layout=gl.SliceLayout(1, L)) + SIDE * HALF
        at = column[None, :] * (2 * HALF) + channel[:, None]
        gl.store(partial_ptr + part * (_ROWS * 2 * HALF) + at, acc * weight[None, :])
        if SIDE == 0:
            gl.store(partial_lse_ptr + part * _ROWS + column, lse)


@gluon.jit
def attend_first_few(
    q_desc, rope_desc, out_desc, tiles, out_tile, exchange, low_ready, high_ready, low_free,
    q_ready, w_ready, totals_ready, items, group, groups, h, s_q, empty_lse, results, scale_log2,
    zero, HAS_ROPE: gl.constexpr, IS_COPIED: gl.constexpr,
):  # fmt: skip
    """Scores of the first block of each pair; output channels 0 to 255.

    tiles: queries' and keys' channels 0 to 255, 256 to 511 and behind, bias. out_tile: [1, heads,
    256]. exchange: the weights of both blocks, what is exchanged of decays, maxima and totals.
    """
    k_low = tiles[3]
    weights_a, weights_b, decays, maxima, totals = exchange
    HEADS: gl.constexpr = out_tile.shape[1]
    L: gl.constexpr = columns_layout(HEADS)
    HEAD: gl.constexpr = gl.SliceLayout(0, L)
    num_items = items[7]
    num_pairs = 0
    next_request, next_query = item_field(items, 1, 0), item_field(items, 1, 1)
    fetch_queries(
        q_desc, rope_desc, next_request, next_query, group, tiles[0], tiles[1], tiles[2], q_ready,
        num_items > 0, HAS_ROPE,
    )  # fmt: skip
    for item in range(1, num_items + 1):
        request, query = next_request, next_query
        next_request = item_field(items, item + 1, 0)
        next_query = item_field(items, item + 1, 1)
        slot = item_field(items, item, 4)
        num_blocks = item_field(items, item, 3) - item_field(items, item, 2)
        largest = gl.full([HEADS], float("-inf"), gl.float32, layout=HEAD)
        sums = gl.full([_BLOCK, HEADS], 0.0, gl.float32, layout=L)
        acc = gl.full([HALF, HEADS], 0.0, gl.float32, layout=L)
        mbarrier.wait(q_ready, (item - 1) & 1)
        for i in range(0, num_blocks, 2):
            phase = num_pairs & 1
            # 0 at run time: known indices would have every descriptor computed ahead and spilled
            a = num_pairs * zero
            b = a + 1
            scores = _block_scores(tiles, low_ready, high_ready, phase, a, 0, HAS_ROPE, IS_COPIED)
            w, decay, largest = _hand_over(
                0, scores, largest, scale_log2, weights_a.index(a), decays, maxima, w_ready
            )
            sums = sums * decay[None, :] + w
            acc = _add_values(k_low.index(a), weights_a.index(a), acc * decay[None, :])
            mbarrier.arrive(low_free.index(0), count=1)
            mbarrier.wait((low_ready if IS_COPIED else high_ready).index(1), phase)
            mbarrier.wait(w_ready.index(1), phase)
            fence_async_shared()
            # both warp groups have their last scores: nobody reads the queries any more
            is_last = (i == num_blocks - 2) & (item < num_items)
            fetch_queries(
                q_desc, rope_desc, next_request, next_query, group, tiles[0], tiles[1], tiles[2],
                q_ready, is_last, HAS_ROPE,
            )  # fmt: skip
            decay = decays.index(1).load(HEAD)
            largest = maxima.index(1).load(HEAD)
            sums = sums * decay[None, :]
            acc = _add_values(k_low.index(b), weights_b.index(a), acc * decay[None, :])
            mbarrier.arrive(low_free.index(1), count=1)
            num_pairs += 1
        _finish(
            0, acc, largest, sums, totals, totals_ready, (item - 1) & 1, out_tile, out_desc,
            request, query, slot, group, h, s_q, empty_lse, results, groups,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def attend_second_few(
    out_desc, tiles, out_tile, exchange, low_ready, high_ready, high_free, q_ready, w_ready,
    totals_ready, items, group, groups, h, s_q, empty_lse, results, scale_log2, zero,
    HAS_ROPE: gl.constexpr, IS_COPIED: gl.constexpr,
):  # fmt: skip
    """Scores of the second block of each pair; output channels 256 to 511.

    Its product with the first block is short: waited for at once, it gives the gatherers their
    buffer back before the second block has come.
    """
    k_high = tiles[4]
    weights_a, weights_b, decays, maxima, totals = exchange
    HEADS: gl.constexpr = out_tile.shape[1]
    L: gl.constexpr = columns_layout(HEADS)
    HEAD: gl.constexpr = gl.SliceLayout(0, L)
    num_items = items[7]
    num_pairs = 0
    for item in range(1, num_items + 1):
        request, query = item_field(items, item, 0), item_field(items, item, 1)
        slot = item_field(items, item, 4)
        num_blocks = item_field(items, item, 3) - item_field(items, item, 2)
        sums = gl.full([_BLOCK, HEADS], 0.0, gl.float32, layout=L)
        acc = gl.full([HALF, HEADS], 0.0, gl.float32, layout=L)
        largest = gl.full([HEADS], float("-inf"), gl.float32, layout=HEAD)
        mbarrier.wait(q_ready, (item - 1) & 1)
        for _ in range(0, num_blocks, 2):
            phase = num_pairs & 1
            a = num_pairs * zero
            b = a + 1
            mbarrier.wait(high_ready.index(0), phase)
            mbarrier.wait(w_ready.index(0), phase)
            fence_async_shared()
            decay = decays.index(0).load(HEAD)
            largest = maxima.index(0).load(HEAD)
            sums = sums * decay[None, :]
            acc = _add_values(k_high.index(a), weights_a.index(a), acc * decay[None, :])
            mbarrier.arrive(high_free.index(0), count=1)
            scores = _block_scores(tiles, low_ready, high_ready, phase, a, 1, HAS_ROPE, IS_COPIED)
            w, decay, largest = _hand_over(
                1, scores, largest, scale_log2, weights_b.index(a), decays, maxima, w_ready
            )
            sums = sums * decay[None, :] + w
            acc = _add_values(k_high.index(b), weights_b.index(a), acc * decay[None, :])
            mbarrier.arrive(high_free.index(1), count=1)
            num_pairs += 1
        _finish(
            1, acc, largest, sums, totals, totals_ready, (item - 1) & 1, out_tile, out_desc,
            request, query, slot, group, h, s_q, empty_lse, results, groups,
        )  # fmt: skip
    tma.store_wait(0)

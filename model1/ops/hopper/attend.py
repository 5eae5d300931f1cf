# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
# pyright: reportPossiblyUnboundVariable=none
"""The attending half of attention on Hopper: scores, softmax, values, results.

Two warp groups; docs/kernels_hopper.md has what each does and when.
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

from model1.ops.hopper.items import item_field
from model1.ops.hopper.softmax import add_scores, first_scores, log2_sum, softmax_step

HEADS = gl.constexpr(64)  # of a program
HALF = gl.constexpr(256)  # channels that a warp group owns
ROPE = gl.constexpr(64)  # rotary channels behind the values, where a format has such
_LN_2 = gl.constexpr(0.6931471805599453)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def tile_layout(rank):
    """What matrix products and tensor maps read: rows of 128 bytes, their pieces permuted."""
    return gl.NVMMASharedLayout(128, 16, rank=rank)


@gluon.constexpr_function
def scores_layout():
    """64 queries x 64 keys, in the registers of a warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.constexpr_function
def out_layout():
    """64 queries x 256 channels, in products of 128."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.jit
def fetch_queries(
    q_desc, rope_desc, request, query, group, q_low, q_high, q_rope, q_ready, is_wanted,
    HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """As many heads of a row as the tiles have, by the copy engine; zeros where none are."""
    HEADS: gl.constexpr = q_low.shape[1]
    TILE: gl.constexpr = tile_layout(4)
    CHANNELS: gl.constexpr = 2 * HALF + ROPE if HAS_ROPE else 2 * HALF
    mbarrier.expect(q_ready, HEADS * CHANNELS * 2, pred=is_wanted)
    if HAS_ROPE:
        tma.async_copy_global_to_shared(
            rope_desc, [request, query, group * HEADS, 2 * HALF], q_ready,
            q_rope.index(0)._reinterpret(gl.bfloat16, [1, 1, HEADS, ROPE], TILE), pred=is_wanted,
        )  # fmt: skip
    tma.async_copy_global_to_shared(
        q_desc, [request, query, group * HEADS, 0], q_ready,
        q_low.index(0)._reinterpret(gl.bfloat16, [1, 1, HEADS, HALF], TILE), pred=is_wanted,
    )  # fmt: skip
    tma.async_copy_global_to_shared(
        q_desc, [request, query, group * HEADS, HALF], q_ready,
        q_high.index(0)._reinterpret(gl.bfloat16, [1, 1, HEADS, HALF], TILE), pred=is_wanted,
    )  # fmt: skip


@gluon.jit
def with_sink(weight, total, lse, sink_ptr, head, h):
    """What results are multiplied with, the sinks of their heads counted in where there are any."""
    if sink_ptr.dtype.is_ptr():
        sink = gl.load(sink_ptr + head, mask=head < h, other=0.0)
        weight = weight / (1.0 + gl.exp2(sink * _LOG2_E - lse))
        weight = gl.where(total == 0.0, 0.0, weight)
    return weight


@gluon.jit
def store_lse(lse, largest, total, head, request, query, h, s_q, empty_lse, lse_ptr, max_ptr):
    """Write an item's lse and, where it is wanted, its largest logits."""
    lse_at = (request.to(gl.int64) * s_q + query) * h + head
    natural = gl.where(total == 0.0, empty_lse, lse * _LN_2)
    gl.store(lse_ptr + lse_at, natural, mask=head < h)
    if max_ptr.dtype.is_ptr():
        # a maximum passes over a NaN
        logit = gl.where(total == total, largest * _LN_2, total)
        gl.store(max_ptr + lse_at, logit, mask=head < h)


@gluon.jit
def _finish(
    SIDE: gl.constexpr, acc, largest, total, totals, totals_ready, parity, store_tile, out_desc,
    request, query, slot, group, h, s_q, empty_lse, results, groups,
):  # fmt: skip
    """Write an item's half of the output, and its lse; 1 if `store_tile` is still read, else 0.

    results: pointers to the lse, the largest logits, sinks, partial results and their lse; any
    integer for the second and third where they are not wanted.
    """
    lse_ptr, max_ptr, sink_ptr, partial_ptr, partial_lse_ptr = results
    S: gl.constexpr = scores_layout()
    O: gl.constexpr = out_layout()  # noqa: E741
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    # each warp group has summed the weights that it computed
    totals.index(SIDE).store(total)
    mbarrier.arrive(totals_ready, count=1)
    mbarrier.wait(totals_ready, parity)
    total = total + totals.index(1 - SIDE).load(ROW)
    lse, weight = log2_sum(largest, total)
    row = gl.arange(0, HEADS, layout=ROW)
    if slot < 0:
        weight = with_sink(weight, total, lse, sink_ptr, group * HEADS + row, h)
        out = acc * gl.convert_layout(weight, gl.SliceLayout(1, O))[:, None]
        store_tile.store(out.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(
            out_desc, [request, query, group * HEADS, SIDE * HALF],
            store_tile._reinterpret(gl.bfloat16, [1, 1, HEADS, HALF], tile_layout(4)),
        )  # fmt: skip
        if SIDE == 0:
            store_lse(
                lse, largest, total, group * HEADS + row, request, query, h, s_q, empty_lse,
                lse_ptr, max_ptr,
            )  # fmt: skip
    else:
        part = slot.to(gl.int64) * groups + group
        channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, O)) + SIDE * HALF
        out_row = gl.arange(0, HEADS, layout=gl.SliceLayout(1, O))
        at = out_row[:, None] * (2 * HALF) + channel[None, :]
        scaled = acc * gl.convert_layout(weight, gl.SliceLayout(1, O))[:, None]
        gl.store(partial_ptr + part * (HEADS * 2 * HALF) + at, scaled)
        if SIDE == 0:
            gl.store(partial_lse_ptr + part * HEADS + row, lse)
    return (slot < 0).to(gl.int32)


@gluon.jit
def _issue_scores(
    tiles, low_ready, high_ready, phase, a, NUMBER: gl.constexpr, HAS_ROPE: gl.constexpr,
    IS_COPIED: gl.constexpr,
):  # fmt: skip
    """Scores of a pair's block NUMBER, which copies bring in halves; to be waited for."""
    mbarrier.wait((low_ready if IS_COPIED else high_ready).index(NUMBER), phase)
    fence_async_shared()
    q_low, q_high, q_rope, k_low, k_high, k_rope = tiles
    scores = first_scores(q_low.index(a), k_low.index(a + NUMBER), scores_layout())
    if IS_COPIED:
        mbarrier.wait(high_ready.index(NUMBER), phase)
        fence_async_shared()
    scores = add_scores(q_high.index(a), k_high.index(a + NUMBER), scores)
    if HAS_ROPE:
        scores = add_scores(q_rope.index(a), k_rope.index(a + NUMBER), scores)
    return scores


@gluon.jit
def attend_first(
    q_desc, rope_desc, q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays, maxima,
    totals, bias, low_ready, high_ready, low_free, q_ready, w_ready, totals_ready, out_desc, items,
    group, groups, h, s_q, empty_lse, results, scale_log2, zero, HAS_ROPE: gl.constexpr,
    IS_COPIED: gl.constexpr,
):  # fmt: skip
    """Scores of the first block of each pair; output channels 0 to 255."""
    S: gl.constexpr = scores_layout()
    O: gl.constexpr = out_layout()  # noqa: E741
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tiles = (q_low, q_high, q_rope, k_low, k_high, k_rope)
    num_items = items[7]
    num_pairs, is_storing = 0, 0
    next_request, next_query = item_field(items, 1, 0), item_field(items, 1, 1)
    fetch_queries(
        q_desc, rope_desc, next_request, next_query, group, q_low, q_high, q_rope, q_ready,
        num_items > 0, HAS_ROPE,
    )  # fmt: skip
    for item in range(1, num_items + 1):
        request, query = next_request, next_query
        next_request = item_field(items, item + 1, 0)
        next_query = item_field(items, item + 1, 1)
        slot = item_field(items, item, 4)
        num_blocks = item_field(items, item, 3) - item_field(items, item, 2)
        # the output of the item before left from here
        tma.store_wait(0)
        mbarrier.arrive(low_free.index(1), count=1, pred=is_storing != 0)
        largest = gl.full([HEADS], float("-inf"), gl.float32, layout=ROW)
        total = gl.full([HEADS], 0.0, gl.float32, layout=ROW)
        acc = gl.full([HEADS, HALF], 0.0, gl.float32, layout=O)
        mbarrier.wait(q_ready, (item - 1) & 1)
        for i in range(0, num_blocks, 2):
            phase = num_pairs & 1
            # 0 at run time: known indices would have every descriptor computed ahead and spilled
            a = num_pairs * zero
            b = a + 1
            scores = _issue_scores(tiles, low_ready, high_ready, phase, a, 0, HAS_ROPE, IS_COPIED)
            scores = warpgroup_mma_wait(0, deps=[scores])
            scores += bias.index(0).load(gl.SliceLayout(0, S)).to(gl.float32)[None, :]
            w, decay, largest = softmax_step(scores, largest, scale_log2)
            narrow = w.to(gl.bfloat16)
            weights.index(a).store(narrow)
            decays.index(0).store(decay)
            maxima.index(0).store(largest)
            fence_async_shared()
            mbarrier.arrive(w_ready.index(0), count=1)
            total = total * decay + gl.sum(w, 1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O))[:, None]
            acc = warpgroup_mma(gl.convert_layout(narrow, A), k_low.index(a), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(low_free.index(0), count=1)
            mbarrier.wait((low_ready if IS_COPIED else high_ready).index(1), phase)
            mbarrier.wait(w_ready.index(1), phase)
            fence_async_shared()
            # both warp groups have their last scores: nobody reads the queries any more
            is_last = (i == num_blocks - 2) & (item < num_items)
            fetch_queries(
                q_desc, rope_desc, next_request, next_query, group, q_low, q_high, q_rope, q_ready,
                is_last, HAS_ROPE,
            )  # fmt: skip
            decay = decays.index(1).load(ROW)
            largest = maxima.index(1).load(ROW)
            total = total * decay
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O))[:, None]
            acc = warpgroup_mma(weights.index(a), k_low.index(b), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            # the last pair's second buffer takes the output first
            mbarrier.arrive(low_free.index(1), count=1, pred=i != num_blocks - 2)
            num_pairs += 1
        is_storing = _finish(
            0, acc, largest, total, totals, totals_ready, (item - 1) & 1, k_low.index(1), out_desc,
            request, query, slot, group, h, s_q, empty_lse, results, groups,
        )  # fmt: skip
        mbarrier.arrive(low_free.index(1), count=1, pred=is_storing == 0)
    tma.store_wait(0)


@gluon.jit
def attend_second(
    q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays, maxima, totals, bias, low_ready,
    high_ready, high_free, q_ready, w_ready, totals_ready, out_desc, items, group, groups, h, s_q,
    empty_lse, results, scale_log2, zero, HAS_ROPE: gl.constexpr, IS_COPIED: gl.constexpr,
):  # fmt: skip
    """Scores of the second block of each pair; output channels 256 to 511."""
    S: gl.constexpr = scores_layout()
    O: gl.constexpr = out_layout()  # noqa: E741
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tiles = (q_low, q_high, q_rope, k_low, k_high, k_rope)
    num_items = items[7]
    num_pairs, is_storing = 0, 0
    for item in range(1, num_items + 1):
        request, query = item_field(items, item, 0), item_field(items, item, 1)
        slot = item_field(items, item, 4)
        num_blocks = item_field(items, item, 3) - item_field(items, item, 2)
        tma.store_wait(0)
        mbarrier.arrive(high_free.index(1), count=1, pred=is_storing != 0)
        largest = gl.full([HEADS], float("-inf"), gl.float32, layout=ROW)
        total = gl.full([HEADS], 0.0, gl.float32, layout=ROW)
        acc = gl.full([HEADS, HALF], 0.0, gl.float32, layout=O)
        mbarrier.wait(q_ready, (item - 1) & 1)
        for i in range(0, num_blocks, 2):
            phase = num_pairs & 1
            a = num_pairs * zero
            b = a + 1
            if IS_COPIED:
                scores = _issue_scores(
                    tiles, low_ready, high_ready, phase, a, 1, HAS_ROPE, IS_COPIED
                )
            mbarrier.wait(high_ready.index(0), phase)
            mbarrier.wait(w_ready.index(0), phase)
            fence_async_shared()
            decay = decays.index(0).load(ROW)
            largest = maxima.index(0).load(ROW)
            total = total * decay
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O))[:, None]
            in_flight = warpgroup_mma(weights.index(a), k_high.index(a), acc, is_async=True)
            if IS_COPIED:
                scores = warpgroup_mma_wait(1, deps=[scores])
            else:
                scores = _issue_scores(
                    tiles, low_ready, high_ready, phase, a, 1, HAS_ROPE, IS_COPIED
                )
                acc = warpgroup_mma_wait(3 if HAS_ROPE else 2, deps=[in_flight])
                mbarrier.arrive(high_free.index(0), count=1)
                scores = warpgroup_mma_wait(0, deps=[scores])
            scores += bias.index(1).load(gl.SliceLayout(0, S)).to(gl.float32)[None, :]
            w, decay, largest = softmax_step(scores, largest, scale_log2)
            narrow = w.to(gl.bfloat16)
            if IS_COPIED:
                acc = warpgroup_mma_wait(0, deps=[in_flight])
                mbarrier.arrive(high_free.index(0), count=1)
            weights.index(a).store(narrow)
            decays.index(1).store(decay)
            maxima.index(1).store(largest)
            fence_async_shared()
            mbarrier.arrive(w_ready.index(1), count=1)
            total = total * decay + gl.sum(w, 1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O))[:, None]
            acc = warpgroup_mma(gl.convert_layout(narrow, A), k_high.index(b), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            # the last pair's second buffer takes the output first
            mbarrier.arrive(high_free.index(1), count=1, pred=i != num_blocks - 2)
            num_pairs += 1
        is_storing = _finish(
            1, acc, largest, total, totals, totals_ready, (item - 1) & 1, k_high.index(1), out_desc,
            request, query, slot, group, h, s_q, empty_lse, results, groups,
        )  # fmt: skip
        mbarrier.arrive(high_free.index(1), count=1, pred=is_storing == 0)
    tma.store_wait(0)

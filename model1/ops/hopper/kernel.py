# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Attention over gathered keys on Hopper: one persistent program per SM and 64 heads,
or up to 32 that lie on the columns of products.

Two warp groups attend; one copies keys that are bf16, or two convert what a cache holds. Keys come
in blocks of 64 tokens, two at a time, a and b. Warp group `attend_first` computes the scores of a
and owns output channels 0 to 255, `attend_second` the scores of b and channels 256 to 511; each
hands its weights to the other. docs/kernels_hopper.md has barriers, budgets and reasons.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from model1.ops.hopper.attend import (
    HALF,
    ROPE,
    attend_first,
    attend_second,
    tile_layout,
)
from model1.ops.hopper.attend import HEADS as ROW_HEADS
from model1.ops.hopper.attend_few import attend_first_few, attend_second_few
from model1.ops.hopper.cursor import BLOCK
from model1.ops.hopper.gather_bf16 import gather_bf16_keys
from model1.ops.hopper.gather_model1 import gather_keys
from model1.ops.hopper.gather_v32 import gather_v32_keys
from model1.ops.hopper.overlap import gluon_release_successor, gluon_wait_for_predecessor


@gluon.jit
def _attend_few(
    q_desc, rope_desc, out_desc, tiles, exchange, barriers, items, lists, main, extra, group,
    groups, h, s_q, empty_lse, results, scale_log2, zero, hidden, COLUMNS: gl.constexpr,
    HAS_ROPE: gl.constexpr, IS_BF16: gl.constexpr, IS_PAGED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Who does what where heads are columns: their queries leave room for tiles of output."""
    TILE: gl.constexpr = tile_layout(2)
    _, _, _, k_low, k_high, k_rope, bias = tiles
    weights, decays, maxima, totals = exchange
    high_ready, low_free, high_free, q_ready, w_ready, totals_ready = barriers
    # the first group still reads its own weights when the second writes its
    more_weights = gl.allocate_shared_memory(gl.bfloat16, [1, COLUMNS, BLOCK], TILE)
    out_low = gl.allocate_shared_memory(gl.bfloat16, [1, COLUMNS, HALF], TILE)
    out_high = gl.allocate_shared_memory(gl.bfloat16, [1, COLUMNS, HALF], TILE)
    exchange = (weights, more_weights, decays, maxima, totals)
    if IS_BF16:
        low_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(low_ready.index(i), count=128)
        gl.warp_specialize([
            (gather_bf16_keys, (
                items, lists, main, extra, k_low, k_high, k_rope, bias, low_ready, high_ready,
                low_free, high_free, hidden, HAS_ROPE, IS_PAGED,
            )),
            (attend_first_few, (
                q_desc, rope_desc, out_desc, tiles, out_low, exchange, low_ready, high_ready,
                low_free, q_ready, w_ready, totals_ready, items, group, groups, h, s_q, empty_lse,
                results, scale_log2, zero, HAS_ROPE, IS_BF16,
            )),
            (attend_second_few, (
                out_desc, tiles, out_high, exchange, low_ready, high_ready, high_free, q_ready,
                w_ready, totals_ready, items, group, groups, h, s_q, empty_lse, results, scale_log2,
                zero, HAS_ROPE, IS_BF16,
            )),
        ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (gather_v32_keys if HAS_ROPE else gather_keys, (
                0, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready, low_free,
                high_free, hidden, IS_PAGED,
            )),
            (attend_first_few, (
                q_desc, rope_desc, out_desc, tiles, out_low, exchange, 0, high_ready, low_free,
                q_ready, w_ready, totals_ready, items, group, groups, h, s_q, empty_lse, results,
                scale_log2, zero, HAS_ROPE, IS_BF16,
            )),
            (attend_second_few, (
                out_desc, tiles, out_high, exchange, 0, high_ready, high_free, q_ready, w_ready,
                totals_ready, items, group, groups, h, s_q, empty_lse, results, scale_log2, zero,
                HAS_ROPE, IS_BF16,
            )),
            (gather_v32_keys if HAS_ROPE else gather_keys, (
                1, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready, low_free,
                high_free, hidden, IS_PAGED,
            )),
        ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def attend_items(
    q_desc, rope_desc, out_desc, lse_ptr, max_ptr, partial_ptr, partial_lse_ptr, sink_ptr,
    items_ptr, item_stride,
    main_slots, main_stride_b, main_stride_s, extra_slots, extra_stride_b, extra_stride_s,
    main_cache, main_units, main_size, main_divisor, main_shift, main_last,
    extra_cache, extra_units, extra_size, extra_divisor, extra_shift, extra_last,
    h, s_q, groups, rows, main_topk, extra_topk, scale_log2, empty_lse, zero,
    hidden, IS_BF16: gl.constexpr, IS_PAGED: gl.constexpr, COLUMNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The items of work of one program; see `model1.ops.hopper.schedule` for what they are.

    The body of a kernel: operators have kernels of their own, whose names a profiler shows.
    IS_PAGED: the main list is a table of blocks, of which the tokens up to the item's number of
    entries are attended to, but for the last `hidden`. COLUMNS: 0, and 64 heads of a program are
    the rows of matrix products; or their number, 8, 16 or 32, and they are the columns.
    """
    TILE: gl.constexpr = tile_layout(2)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    HAS_ROPE: gl.constexpr = rope_desc is not None
    HEADS: gl.constexpr = COLUMNS if COLUMNS else ROW_HEADS
    # An allocation for each: between accesses to one the compiler lets all warps of a group wait.
    k_low = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, HALF], TILE)
    k_high = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, HALF], TILE)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, HALF], TILE)
    q_high = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, HALF], TILE)
    k_rope, q_rope, rope_queries = k_low, q_low, q_desc
    if HAS_ROPE:
        k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, ROPE], TILE)
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROPE], TILE)
        rope_queries = rope_desc
    # one tile: each warp group has read the other's weights before it writes its own
    weights = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, BLOCK], TILE)
    bias = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK], ROWS)
    decays = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    maxima = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    totals = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    high_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    low_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    high_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    w_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    others = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_ready, totals_ready = others.index(0), others.index(1)
    for i in gl.static_range(2):
        # what is copied arrives thread by thread: all channels, or the rotary of V3.2's rows
        mbarrier.init(high_ready.index(i), count=1 + 128 if IS_BF16 else 2 + 256 if HAS_ROPE else 2)
        mbarrier.init(low_free.index(i), count=1)
        mbarrier.init(high_free.index(i), count=1)
        mbarrier.init(w_ready.index(i), count=1)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(totals_ready, count=2)
    group = gl.program_id(0) % groups
    program, num_programs = gl.program_id(0) // groups, gl.num_programs(0) // groups
    listed = group  # no pointer where there is no list
    num_items = (rows - program + num_programs - 1) // num_programs
    gluon_release_successor()  # a merge, which waits for all of this kernel, or nobody
    if items_ptr is not None:
        gluon_wait_for_predecessor()
        listed = items_ptr + program * item_stride
        num_items = gl.load(listed)
    pairs = ((main_topk + BLOCK - 1) // BLOCK + (extra_topk + BLOCK - 1) // BLOCK + 1) // 2
    num_blocks = gl.maximum(2 * pairs, 2)
    items = (listed, program, num_programs, s_q, num_blocks, main_topk, extra_topk, num_items)
    lists = (main_slots, main_stride_b, main_stride_s, extra_slots, extra_stride_b, extra_stride_s)
    main = (main_cache, main_units, main_size, main_divisor, main_shift, main_last)
    extra = (extra_cache, extra_units, extra_size, extra_divisor, extra_shift, extra_last)
    results = (
        lse_ptr, group if max_ptr is None else max_ptr, group if sink_ptr is None else sink_ptr,
        partial_ptr, partial_lse_ptr,
    )  # fmt: skip
    if COLUMNS:
        _attend_few(
            q_desc, rope_queries, out_desc, (q_low, q_high, q_rope, k_low, k_high, k_rope, bias),
            (weights, decays, maxima, totals),
            (high_ready, low_free, high_free, q_ready, w_ready, totals_ready), items, lists, main,
            extra, group, groups, h, s_q, empty_lse, results, scale_log2, zero, hidden, COLUMNS,
            HAS_ROPE, IS_BF16, IS_PAGED, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
        )  # fmt: skip
    elif IS_BF16:
        low_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        for i in gl.static_range(2):
            mbarrier.init(low_ready.index(i), count=128)
        gl.warp_specialize([
            (gather_bf16_keys, (
                items, lists, main, extra, k_low, k_high, k_rope, bias, low_ready, high_ready,
                low_free, high_free, hidden, HAS_ROPE, IS_PAGED,
            )),
            (attend_first, (
                q_desc, rope_queries, q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays,
                maxima, totals, bias, low_ready, high_ready, low_free, q_ready, w_ready,
                totals_ready, out_desc, items, group, groups, h, s_q, empty_lse, results,
                scale_log2, zero, HAS_ROPE, IS_BF16,
            )),
            (attend_second, (
                q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays, maxima, totals, bias,
                low_ready, high_ready, high_free, q_ready, w_ready, totals_ready, out_desc, items,
                group, groups, h, s_q, empty_lse, results, scale_log2, zero, HAS_ROPE, IS_BF16,
            )),
        ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (gather_v32_keys if HAS_ROPE else gather_keys, (
                0, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready, low_free,
                high_free, hidden, IS_PAGED,
            )),
            (attend_first, (
                q_desc, rope_queries, q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays,
                maxima, totals, bias, 0, high_ready, low_free, q_ready, w_ready, totals_ready,
                out_desc, items, group, groups, h, s_q, empty_lse, results, scale_log2, zero,
                HAS_ROPE, IS_BF16,
            )),
            (attend_second, (
                q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays, maxima, totals, bias,
                0, high_ready, high_free, q_ready, w_ready, totals_ready, out_desc, items,
                group, groups, h, s_q, empty_lse, results, scale_log2, zero, HAS_ROPE, IS_BF16,
            )),
            (gather_v32_keys if HAS_ROPE else gather_keys, (
                1, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready, low_free,
                high_free, hidden, IS_PAGED,
            )),
        ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip

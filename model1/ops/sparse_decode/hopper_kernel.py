# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Sparse decode over MODEL1 and V3.2 caches on Hopper: one persistent program per SM and 64 heads.

Four warp groups: two gather and convert keys, two attend. Keys come in blocks of 64 tokens, two
at a time, a and b. Warp group `attend_first` computes the scores of a and owns output channels 0
to 255, `attend_second` the scores of b and channels 256 to 511; each hands its weights to the
other. docs/kernels_hopper.md has barriers, budgets and reasons.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from model1.ops.hopper.overlap import (
    gluon_release_successor,
    gluon_wait_for_predecessor,
)
from model1.ops.sparse_decode.hopper_attend import (
    HALF,
    HEADS,
    ROPE,
    attend_first,
    attend_second,
    tile_layout,
)
from model1.ops.sparse_decode.hopper_gather import BLOCK, gather_keys
from model1.ops.sparse_decode.hopper_gather_v32 import gather_v32_keys

_SIZES = [
    "h", "s_q", "groups", "rows", "main_topk", "extra_topk", "zero",
    "main_stride_b", "main_stride_s", "extra_stride_b", "extra_stride_s",
    "main_units", "main_size", "main_divisor", "main_shift", "main_last",
    "extra_units", "extra_size", "extra_divisor", "extra_shift", "extra_last",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _flash_fwd_splitkv_mla_fp8_sparse_kernel(
    q_desc, rope_desc, out_desc, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr, items_ptr,
    item_stride,
    main_slots, main_stride_b, main_stride_s, extra_slots, extra_stride_b, extra_stride_s,
    main_cache, main_units, main_size, main_divisor, main_shift, main_last,
    extra_cache, extra_units, extra_size, extra_divisor, extra_shift, extra_last,
    h, s_q, groups, rows, main_topk, extra_topk, scale_log2, empty_lse, zero,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The items of work of one program; see `model1.ops.hopper.schedule` for what they are."""
    TILE: gl.constexpr = tile_layout(2)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    HAS_SINK: gl.constexpr = sink_ptr is not None
    HAS_ROPE: gl.constexpr = rope_desc is not None
    k_low = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, HALF], TILE)
    k_high = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, HALF], TILE)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, HALF], TILE)
    q_high = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, HALF], TILE)
    k_rope, q_rope = k_low, q_low
    rope_queries, sinks = q_desc, lse_ptr
    if HAS_ROPE:
        k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, ROPE], TILE)
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROPE], TILE)
        rope_queries = rope_desc
    if HAS_SINK:
        sinks = sink_ptr
    # one tile: each warp group has read the other's weights before it writes its own
    weights = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, BLOCK], TILE)
    bias = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK], ROWS)
    decays = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    maxima = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    totals = gl.allocate_shared_memory(gl.float32, [2, HEADS], ROWS)
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    low_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    high_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    w_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    others = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_ready, totals_ready = others.index(0), others.index(1)
    for i in gl.static_range(2):
        # rotary channels are copied: each thread of two warp groups arrives by itself
        mbarrier.init(k_ready.index(i), count=2 + 256 if HAS_ROPE else 2)
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
    gl.warp_specialize([
        (gather_v32_keys if HAS_ROPE else gather_keys, (
            0, items, lists, main, extra, k_low, k_high, k_rope, bias, k_ready, low_free,
            high_free,
        )),
        (attend_first, (
            q_desc, rope_queries, q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays,
            maxima, totals, bias, k_ready, low_free, q_ready, w_ready, totals_ready, out_desc,
            items, group, groups, h, s_q, lse_ptr, empty_lse, sinks, partial_ptr, partial_lse_ptr,
            scale_log2, zero, HAS_SINK, HAS_ROPE,
        )),
        (attend_second, (
            q_low, q_high, q_rope, k_low, k_high, k_rope, weights, decays, maxima, totals, bias,
            k_ready, high_free, q_ready, w_ready, totals_ready, out_desc, items, group, groups, h,
            s_q, lse_ptr, empty_lse, sinks, partial_ptr, partial_lse_ptr, scale_log2, zero,
            HAS_SINK, HAS_ROPE,
        )),
        (gather_v32_keys if HAS_ROPE else gather_keys, (
            1, items, lists, main, extra, k_low, k_high, k_rope, bias, k_ready, low_free,
            high_free,
        )),
    ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip

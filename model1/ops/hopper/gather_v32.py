# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""The gathering half over V3.2's rows: `gather_model1` with other bytes."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from model1.ops.hopper.cursor import BLOCK, load_slots, next_block, open_list
from model1.ops.hopper.items import item_field
from model1.ops.hopper.rows_model1 import TOKENS, codes_layout, load_codes, side_by_side
from model1.ops.hopper.rows_v32 import (
    convert_v32_codes,
    copy_rope,
    load_scale,
    prefetch_v32_rows,
    v32_rows,
)


@gluon.jit
def _rows(slot, cache):
    return v32_rows(slot, cache[0], cache[1], cache[2], cache[3], cache[4], cache[5])


@gluon.jit
def gather_v32_keys(
    HALF_BLOCK: gl.constexpr, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready,
    low_free, high_free, hidden, IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Keep half of every block coming: slots three blocks ahead, L2 two, registers one.

    Rotary channels go from L2 straight into their tile, which is free when both others are.
    """
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    num_items = items[7]
    token = HALF_BLOCK * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, codes_layout()))
    if num_items > 0:
        item, block, end = 1, item_field(items, 1, 2), item_field(items, 1, 3)
        item_now, left_now = 1, end - block
        start, left, cache = open_list(items, item, block, lists, main, extra)
        rows, exists = _rows(
            load_slots(items, item, start, left, cache, token, hidden, IS_PAGED), cache
        )
        item, block, end, start, left, cache = next_block(
            items, item, block, end, start, left, cache, lists, main, extra
        )
        next_rows, next_exists = _rows(
            load_slots(items, item, start, left, cache, token, hidden, IS_PAGED), cache
        )
        item, block, end, start, left, cache = next_block(
            items, item, block, end, start, left, cache, lists, main, extra
        )
        slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
        s0, s1 = load_scale(rows, exists, 0), load_scale(rows, exists, 1)
        s2, s3 = load_scale(rows, exists, 2), load_scale(rows, exists, 3)
        x0 = load_codes(rows, exists, 0)
        x1 = load_codes(rows, exists, 1)
        x2 = load_codes(rows, exists, 2)
        x3 = load_codes(rows, exists, 3)
        x4 = load_codes(rows, exists, 4)
        x5 = load_codes(rows, exists, 5)
        x6 = load_codes(rows, exists, 6)
        x7 = load_codes(rows, exists, 7)
        num_blocks = 0
        while item_now <= num_items:
            buffer, phase = num_blocks & 1, (num_blocks >> 1) & 1
            low = k_low.index(buffer)._reinterpret(gl.int32, [BLOCK, 128], WORDS)
            high = k_high.index(buffer)._reinterpret(gl.int32, [BLOCK, 128], WORDS)
            last = k_rope.index(buffer)._reinterpret(gl.int32, [BLOCK, 32], WORDS)
            low = low.slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            high = high.slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            last = last.slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            new_bias = gl.where(exists, 0.0, float("-inf"))
            old_rows, old_exists = rows, exists
            rows, exists = next_rows, next_exists
            mbarrier.wait(low_free.index(buffer), phase ^ 1)
            low.slice(0, 64, dim=1).store(
                side_by_side(convert_v32_codes(x0, s0), convert_v32_codes(x1, s0))
            )
            low.slice(64, 64, dim=1).store(
                side_by_side(convert_v32_codes(x2, s1), convert_v32_codes(x3, s1))
            )
            s0, s1 = load_scale(rows, exists, 0), load_scale(rows, exists, 1)
            x0 = load_codes(rows, exists, 0)
            x1 = load_codes(rows, exists, 1)
            x2 = load_codes(rows, exists, 2)
            x3 = load_codes(rows, exists, 3)
            mbarrier.wait(high_free.index(buffer), phase ^ 1)
            copy_rope(old_rows, old_exists, last)
            async_copy.mbarrier_arrive(high_ready.index(buffer), increment_count=False)
            high.slice(0, 64, dim=1).store(
                side_by_side(convert_v32_codes(x4, s2), convert_v32_codes(x5, s2))
            )
            high.slice(64, 64, dim=1).store(
                side_by_side(convert_v32_codes(x6, s3), convert_v32_codes(x7, s3))
            )
            s2, s3 = load_scale(rows, exists, 2), load_scale(rows, exists, 3)
            x4 = load_codes(rows, exists, 4)
            x5 = load_codes(rows, exists, 5)
            x6 = load_codes(rows, exists, 6)
            x7 = load_codes(rows, exists, 7)
            place = bias.index(buffer).slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            place.store(new_bias.to(gl.bfloat16))
            mbarrier.arrive(high_ready.index(buffer), count=1)
            next_rows, next_exists = _rows(slot, cache)
            prefetch_v32_rows(next_rows)
            item, block, end, start, left, cache = next_block(
                items, item, block, end, start, left, cache, lists, main, extra
            )
            slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
            left_now -= 1
            if left_now == 0:
                item_now += 1
                left_now = item_field(items, item_now, 3) - item_field(items, item_now, 2)
            num_blocks += 1

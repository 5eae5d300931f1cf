# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""The gathering half of attention on Hopper over MODEL1's rows: from slots to bf16 keys."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from model1.ops.hopper.cursor import BLOCK, load_slots, next_block, open_list
from model1.ops.hopper.items import item_field
from model1.ops.hopper.rows_model1 import (
    TOKENS,
    codes_layout,
    convert_codes,
    load_codes,
    load_rope,
    nan_bits,
    prefetch_rows,
    row_pointers,
    side_by_side,
)


@gluon.jit
def _pointers(slot, cache):
    return row_pointers(slot, cache[0], cache[1], cache[2], cache[3], cache[4], cache[5])


@gluon.jit
def gather_keys(
    HALF_BLOCK: gl.constexpr, items, lists, main, extra, k_low, k_high, k_rope, bias, high_ready,
    low_free, high_free, hidden, IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Keep half of every block coming: slots three blocks ahead, L2 two, registers one.

    What is stored here is fenced where it is read: a fence here would wait for the next block's
    loads as well.
    """
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    num_items = items[7]
    token = HALF_BLOCK * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, codes_layout()))
    if num_items > 0:
        item, block, end = 1, item_field(items, 1, 2), item_field(items, 1, 3)
        item_now, left_now = 1, end - block
        start, left, cache = open_list(items, item, block, lists, main, extra)
        rows, scales, exists = _pointers(
            load_slots(items, item, start, left, cache, token, hidden, IS_PAGED), cache
        )
        item, block, end, start, left, cache = next_block(
            items, item, block, end, start, left, cache, lists, main, extra
        )
        next_rows, next_scales, next_exists = _pointers(
            load_slots(items, item, start, left, cache, token, hidden, IS_PAGED), cache
        )
        item, block, end, start, left, cache = next_block(
            items, item, block, end, start, left, cache, lists, main, extra
        )
        slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
        scale_low = gl.load(scales, mask=exists, other=0)
        scale_high = gl.load(scales + 1, mask=exists, other=0)
        x0 = load_codes(rows, exists, 0)
        x1 = load_codes(rows, exists, 1)
        x2 = load_codes(rows, exists, 2)
        x3 = load_codes(rows, exists, 3)
        x4 = load_codes(rows, exists, 4)
        x5 = load_codes(rows, exists, 5)
        x6 = load_codes(rows, exists, 6)
        rope = load_rope(rows, exists)
        num_blocks = 0
        while item_now <= num_items:
            buffer, phase = num_blocks & 1, (num_blocks >> 1) & 1
            low = k_low.index(buffer)._reinterpret(gl.int32, [BLOCK, 128], WORDS)
            high = k_high.index(buffer)._reinterpret(gl.int32, [BLOCK, 128], WORDS)
            low = low.slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            high = high.slice(HALF_BLOCK * TOKENS, TOKENS, dim=0)
            new_bias = gl.where(exists, 0.0, float("-inf"))
            rows, exists = next_rows, next_exists
            mbarrier.wait(low_free.index(buffer), phase ^ 1)
            # a scale byte of 255, or any NaN code, makes every product with the token NaN
            nan = nan_bits(gl.zeros_like(scale_low), scale_low) & scale_low
            found = nan_bits(gl.zeros_like(x0), x0)
            found = nan_bits(nan_bits(nan_bits(found, x1), x2), x3)
            nan |= gl.reduce_or(found, 1)
            low.slice(0, 64, dim=1).store(
                side_by_side(convert_codes(x0, scale_low, 0), convert_codes(x1, scale_low, 1))
            )
            low.slice(64, 64, dim=1).store(
                side_by_side(convert_codes(x2, scale_low, 2), convert_codes(x3, scale_low, 3))
            )
            scale_low = gl.load(next_scales, mask=exists, other=0)
            x0 = load_codes(rows, exists, 0)
            x1 = load_codes(rows, exists, 1)
            x2 = load_codes(rows, exists, 2)
            x3 = load_codes(rows, exists, 3)
            mbarrier.wait(high_free.index(buffer), phase ^ 1)
            nan |= nan_bits(gl.zeros_like(nan), scale_high & 0xFFFFFF) & scale_high
            found = nan_bits(gl.zeros_like(x4), x4)
            nan |= gl.reduce_or(nan_bits(nan_bits(found, x5), x6), 1)
            new_bias = gl.where(nan != 0, float("nan"), new_bias)
            y6 = convert_codes(x6, scale_high, 2)
            high.slice(64, 64, dim=1).store(
                side_by_side(y6, gl.convert_layout(rope, y6.type.layout, assert_trivial=True))
            )
            high.slice(0, 64, dim=1).store(
                side_by_side(convert_codes(x4, scale_high, 0), convert_codes(x5, scale_high, 1))
            )
            scale_high = gl.load(next_scales + 1, mask=exists, other=0)
            x4 = load_codes(rows, exists, 4)
            x5 = load_codes(rows, exists, 5)
            x6 = load_codes(rows, exists, 6)
            rope = load_rope(rows, exists)
            bias.index(buffer).slice(HALF_BLOCK * TOKENS, TOKENS, dim=0).store(
                new_bias.to(gl.bfloat16)
            )
            mbarrier.arrive(high_ready.index(buffer), count=1)
            next_rows, next_scales, next_exists = _pointers(slot, cache)
            prefetch_rows(next_rows, next_scales)
            item, block, end, start, left, cache = next_block(
                items, item, block, end, start, left, cache, lists, main, extra
            )
            slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
            left_now -= 1
            if left_now == 0:
                item_now += 1
                left_now = item_field(items, item_now, 3) - item_field(items, item_now, 2)
            num_blocks += 1

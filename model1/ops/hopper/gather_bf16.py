# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""The gathering half of attention on Hopper over rows of bf16, which are copied as they are.

A warp group of 128 threads takes all 64 tokens of a block: eight neighbouring lanes have one token,
each 16 bytes of a piece of 64 channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from model1.ops.hopper.cursor import BLOCK, load_slots, next_block, open_list
from model1.ops.hopper.items import item_field
from model1.ops.hopper.rows_model1 import locate

_ITEM_BYTES = gl.constexpr(2)
_HALF = gl.constexpr(256)  # channels of a tile
_ROPE = gl.constexpr(64)  # channels behind two tiles, where rows have such


@gluon.constexpr_function
def copy_layout():
    """Tokens x channels, 16 bytes a lane."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _rows(slot, cache, HAS_ROPE: gl.constexpr):
    """Where the rows of `slot` [64] are, and which exist."""
    row_bytes = (2 * _HALF + _ROPE if HAS_ROPE else 2 * _HALF) * _ITEM_BYTES
    start, token, exists = locate(slot, cache[0], cache[1], cache[2], cache[3], cache[4], cache[5])
    return start + token.to(gl.int64) * row_bytes, exists


@gluon.jit
def _copy(rows, exists, tile, FIRST: gl.constexpr, NUM: gl.constexpr):
    """Start copying NUM channels from FIRST on to `tile` [64, NUM]; zeros where no row exists."""
    channel = gl.arange(0, NUM, layout=gl.SliceLayout(0, copy_layout()))[None, :] + FIRST
    rows = rows.to(gl.pointer_type(gl.bfloat16), bitcast=True)
    async_copy.async_copy_global_to_shared(tile, rows[:, None] + channel, mask=exists[:, None])


@gluon.jit
def gather_bf16_keys(
    items, lists, main, extra, k_low, k_high, k_rope, bias, low_ready, high_ready, low_free,
    high_free, hidden, HAS_ROPE: gl.constexpr, IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Keep keys coming: slots two blocks ahead; asking the L2 cache for rows made it slower.

    Rotary channels have a tile of their own, which is free when both others are.
    """
    num_items = items[7]
    token = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, copy_layout()))
    if num_items > 0:
        item, block, end = 1, item_field(items, 1, 2), item_field(items, 1, 3)
        item_now, left_now = 1, end - block
        start, left, cache = open_list(items, item, block, lists, main, extra)
        slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
        rows, exists = _rows(slot, cache, HAS_ROPE)
        item, block, end, start, left, cache = next_block(
            items, item, block, end, start, left, cache, lists, main, extra
        )
        slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
        num_blocks = 0
        while item_now <= num_items:
            buffer, phase = num_blocks & 1, (num_blocks >> 1) & 1
            mbarrier.wait(low_free.index(buffer), phase ^ 1)
            _copy(rows, exists, k_low.index(buffer), 0, _HALF)
            async_copy.mbarrier_arrive(low_ready.index(buffer), increment_count=False)
            mbarrier.wait(high_free.index(buffer), phase ^ 1)
            _copy(rows, exists, k_high.index(buffer), _HALF, _HALF)
            if HAS_ROPE:
                _copy(rows, exists, k_rope.index(buffer), 2 * _HALF, _ROPE)
            async_copy.mbarrier_arrive(high_ready.index(buffer), increment_count=False)
            bias.index(buffer).store(gl.where(exists, 0.0, float("-inf")).to(gl.bfloat16))
            mbarrier.arrive(high_ready.index(buffer), count=1)
            rows, exists = _rows(slot, cache, HAS_ROPE)
            item, block, end, start, left, cache = next_block(
                items, item, block, end, start, left, cache, lists, main, extra
            )
            slot = load_slots(items, item, start, left, cache, token, hidden, IS_PAGED)
            left_now -= 1
            if left_now == 0:
                item_now += 1
                left_now = item_field(items, item_now, 3) - item_field(items, item_now, 2)
            num_blocks += 1

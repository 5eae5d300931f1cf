# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Where in the lists of slots a gathering warp group stands, and the slots that come next."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from model1.ops.hopper.items import item_field
from model1.ops.hopper.rows_model1 import divide

BLOCK = gl.constexpr(64)  # tokens of a block


@gluon.jit
def open_list(items, item, block, lists, main, extra):
    """Where an item's slots continue with `block`, how many entries are left, and their cache."""
    num_main = item_field(items, item, 5)
    main_blocks = (num_main + 63) >> 6
    is_main = block < main_blocks
    first = gl.where(is_main, block, block - main_blocks) * BLOCK
    left = gl.where(is_main, num_main, item_field(items, item, 6)) - first
    start = gl.where(is_main, lists[0], lists[3])
    start += item_field(items, item, 0).to(gl.int64) * gl.where(is_main, lists[1], lists[4])
    start += item_field(items, item, 1).to(gl.int64) * gl.where(is_main, lists[2], lists[5])
    cache = (
        gl.where(is_main, main[0], extra[0]), gl.where(is_main, main[1], extra[1]),
        gl.where(is_main, main[2], extra[2]), gl.where(is_main, main[3], extra[3]),
        gl.where(is_main, main[4], extra[4]), gl.where(is_main, main[5], extra[5]),
    )  # fmt: skip
    return start + first, left, cache


@gluon.jit
def load_slots(items, item, start, left, cache, token, hidden, IS_PAGED: gl.constexpr):
    """The slots of `token`, places in a block; -1 where the list has ended.

    IS_PAGED: the list is the request's tokens but for the last `hidden`, in the blocks that its row
    of a table names.
    """
    if IS_PAGED:
        position = item_field(items, item, 5) - left
        row = start - position
        is_key = token < left - hidden
        position += token
        page = divide(position, cache[3], cache[4])
        block = gl.load(row + page, mask=is_key, other=-1)
        slot = gl.where(block >= 0, block * cache[2] + position - page * cache[2], -1)
    else:
        slot = gl.load(start + token, mask=token < left, other=-1)
    return slot


@gluon.jit
def next_block(items, item, block, end, start, left, cache, lists, main, extra):
    """One block on; behind the last item stands an entry without slots and without an end."""
    block += 1
    start += BLOCK
    left -= BLOCK
    if (left <= 0) | (block == end):
        is_end = block == end
        item = gl.where(is_end, item + 1, item)
        block = gl.where(is_end, item_field(items, item, 2), block)
        end = item_field(items, item, 3)
        start, left, cache = open_list(items, item, block, lists, main, extra)
    return item, block, end, start, left, cache

# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Reading the items of work that `model1.ops.hopper.schedule` lists."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from model1.ops.hopper.schedule import ITEM_FIELDS

_FIELDS = gl.constexpr(ITEM_FIELDS)


@gluon.jit
def _no_slot(item):
    # Triton 3.6 crashes over a branch that it can see is never taken
    return gl.inline_asm_elementwise(
        "mov.b32 $0, -1;", "=r,r", [item], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def item_field(items, item, FIELD: gl.constexpr):
    """One number of an item: listed or, where all rows are whole and alike, computed.

    items: pointer to the program's list or, without one, any integer; the program's number, the
    number of programs, queries of a request, blocks of a row, entries of the main and of the
    extra list, number of items.
    """
    listed, program, num_programs, s_q, num_blocks, main, extra, num_items = items
    row = (item - 1) * num_programs + program
    if listed.dtype.is_ptr():
        value = gl.load(listed + item * _FIELDS + FIELD)
    elif FIELD == 0:
        value = gl.where(item <= num_items, row // s_q, 0)
    elif FIELD == 1:
        value = gl.where(item <= num_items, row % s_q, 0)
    elif FIELD == 2:
        value = 0
    elif FIELD == 3:
        value = gl.where(item <= num_items, num_blocks, 1 << 30)
    elif FIELD == 4:
        value = _no_slot(item)
    elif FIELD == 5:
        value = gl.where(item <= num_items, main, 0)
    else:
        value = gl.where(item <= num_items, extra, 0)
    return value

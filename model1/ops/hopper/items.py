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
def item_field(items, item, FIELD: gl.constexpr):
    """One number of an item."""
    return gl.load(items + item * _FIELDS + FIELD)

# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Paged decode on Hopper: the kernel whose body is `model1.ops.hopper.kernel`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from model1.ops.hopper.kernel import attend_items

_SIZES = [
    "h", "groups", "rows", "max_seqlen", "stride_table", "last_query", "heads_of_query", "zero",
    "units", "size", "divisor", "shift", "last",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _flash_fwd_splitkv_mla_kernel(
    q_desc, rope_desc, out_desc, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr, items_ptr,
    item_stride, block_table_ptr, stride_table, cache_ptr, units, size, divisor, shift, last,
    h, groups, rows, max_seqlen, last_query, heads_of_query, scale_log2, empty_lse, zero,
    IS_CAUSAL: gl.constexpr, IS_BF16: gl.constexpr, COLUMNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per SM and 64 heads, or COLUMNS; a request's queries are one with all heads.

    With IS_CAUSAL 64 heads belong to one of the queries 0 to last_query, heads_of_query each.
    """
    hidden = zero
    if IS_CAUSAL:
        hidden = last_query - (gl.program_id(0) % groups) * 64 // heads_of_query
    attend_items(
        q_desc, rope_desc, out_desc, lse_ptr, None, partial_ptr, partial_lse_ptr, sink_ptr,
        items_ptr, item_stride,
        block_table_ptr, stride_table, 0, block_table_ptr, stride_table, 0,
        cache_ptr, units, size, divisor, shift, last, cache_ptr, units, size, divisor, shift, last,
        h, 1, groups, rows, max_seqlen, 0, scale_log2, empty_lse, zero,
        hidden, IS_BF16, True, COLUMNS, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip

# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Sparse prefill on Hopper: the kernel whose body is `model1.ops.hopper.kernel`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from model1.ops.hopper.kernel import attend_items

_SIZES = [
    "h", "groups", "rows", "topk", "stride_topk", "zero", "units", "size", "divisor", "shift",
    "last",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _sparse_attn_fwd_kernel(
    q_desc, rope_desc, out_desc, lse_ptr, max_ptr, sink_ptr, items_ptr, item_stride,
    topk_indices_ptr, stride_topk, kv_ptr, units, size, divisor, shift, last,
    h, groups, rows, topk, scale_log2, empty_lse, zero,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, IS_BF16: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """One program per SM and 64 heads, or COLUMNS; a query is a request, a key a block of one."""
    attend_items(
        q_desc, rope_desc, out_desc, lse_ptr, max_ptr, lse_ptr, lse_ptr, sink_ptr,
        items_ptr, item_stride,
        topk_indices_ptr, stride_topk, 0, topk_indices_ptr, stride_topk, 0,
        kv_ptr, units, size, divisor, shift, last, kv_ptr, units, size, divisor, shift, last,
        h, 1, groups, rows, topk, 0, scale_log2, empty_lse, zero,
        0, IS_BF16, False, COLUMNS, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip

# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Sparse decode on Hopper: the kernel whose body is `model1.ops.hopper.kernel`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from model1.ops.hopper.kernel import attend_items

_SIZES = [
    "h", "s_q", "groups", "rows", "main_topk", "extra_topk", "zero",
    "main_stride_b", "main_stride_s", "extra_stride_b", "extra_stride_s",
    "main_units", "main_size", "main_divisor", "main_shift", "main_last",
    "extra_units", "extra_size", "extra_divisor", "extra_shift", "extra_last",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _flash_fwd_splitkv_mla_fp8_sparse_kernel(
    q_desc, rope_desc, out_desc, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr,
    items_ptr, item_stride,
    main_slots, main_stride_b, main_stride_s, extra_slots, extra_stride_b, extra_stride_s,
    main_cache, main_units, main_size, main_divisor, main_shift, main_last,
    extra_cache, extra_units, extra_size, extra_divisor, extra_shift, extra_last,
    h, s_q, groups, rows, main_topk, extra_topk, scale_log2, empty_lse, zero,
    IS_BF16: gl.constexpr, COLUMNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per SM and 64 heads, or COLUMNS."""
    attend_items(
        q_desc, rope_desc, out_desc, lse_ptr, None, partial_ptr, partial_lse_ptr, sink_ptr,
        items_ptr, item_stride,
        main_slots, main_stride_b, main_stride_s, extra_slots, extra_stride_b, extra_stride_s,
        main_cache, main_units, main_size, main_divisor, main_shift, main_last,
        extra_cache, extra_units, extra_size, extra_divisor, extra_shift, extra_last,
        h, s_q, groups, rows, main_topk, extra_topk, scale_log2, empty_lse, zero,
        0, IS_BF16, False, COLUMNS, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
    )  # fmt: skip

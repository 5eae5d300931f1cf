# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Run-time parameters of a Triton kernel have no Python type.
"""The merge of rows that several programs attended to; plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from model1.ops.hopper.overlap import wait_for_predecessor
from model1.ops.online_softmax import LOWEST_LOGIT, merge_step
from model1.ops.sparse_decode.portable_kernel import store_lse, weight_and_lse

_HEADS = tl.constexpr(64)
_CHANNELS = tl.constexpr(512)


@triton.jit
def _flash_fwd_mla_combine_kernel(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, sink_ptr, bounds_ptr, spans_ptr,
    first_row, h, groups, num_programs, empty_lse, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one head of one row, if it was split; BLOCK_S partial results a step."""
    if OVERLAPS:
        wait_for_predecessor()
    piece = tl.program_id(0) % (_CHANNELS // BLOCK_C)
    row_head = tl.program_id(0) // (_CHANNELS // BLOCK_C)
    row, head = row_head // h, row_head % h
    start, end = tl.load(spans_ptr + 2 * row), tl.load(spans_ptr + 2 * row + 1)
    program = tl.arange(0, BLOCK_G)
    is_program = program < num_programs
    bound = tl.load(bounds_ptr + program, mask=is_program, other=0)
    next_bound = tl.load(bounds_ptr + program + 1, mask=is_program, other=0)
    has_part = is_program & (next_bound > start) & (bound < end) & (next_bound > bound)
    first = tl.min(tl.where(has_part, program, BLOCK_G), 0)
    last = tl.max(tl.where(has_part, program, -1), 0)
    if last <= first:
        return
    channel = piece * BLOCK_C + tl.arange(0, BLOCK_C)
    row_max, row_sum = LOWEST_LOGIT, 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(first, last + 1, BLOCK_S):
        part = begin + tl.arange(0, BLOCK_S)
        is_part = part <= last
        from_ = tl.load(bounds_ptr + part, mask=is_part, other=0)
        is_part &= tl.load(bounds_ptr + part + 1, mask=is_part, other=0) > from_
        slot = 2 * part + (start >= from_).to(tl.int32)
        at = (slot.to(tl.int64) * groups + head // _HEADS) * _HEADS + head % _HEADS
        lse = tl.load(partial_lse_ptr + at, mask=is_part, other=float("-inf"))
        partial = tl.load(
            partial_ptr + (at * _CHANNELS)[:, None] + channel[None, :], mask=is_part[:, None],
            other=0.0,
        )  # fmt: skip
        acc, row_max, row_sum = merge_step(lse, partial, acc, row_max, row_sum)
    weight, lse = weight_and_lse(row_max, row_sum, sink_ptr, head, head < h)
    row_head = (first_row + row).to(tl.int64) * h + head
    if piece == 0:
        store_lse(lse_ptr + row_head, lse, head < h, empty_lse)
    out = (acc * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_head * _CHANNELS + channel, out)

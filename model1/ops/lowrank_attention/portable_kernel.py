# pyright: reportMissingParameterType=none
# Only constexpr parameters of a kernel carry types.
"""What sparse attention does before and after its passes over the cache, in Triton.

Library products would do, but choose their order of summation by the number of rows: with these
kernels a row's bits depend on the row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

_STEP = tl.constexpr(64)  # channels of one step of a product


@triton.jit(do_not_specialize=["num_rows"])
def _lowrank_queries_kernel(
    q_ptr,
    basis_ptr,  # [R, D_NOPE]
    mean_ptr,  # [D_NOPE]
    scan_q_ptr,  # [t, H, R + D_ROPE]
    offset_ptr,  # [t, H] fp32
    num_rows,
    stride_qt,
    stride_qh,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    D_NOPE: tl.constexpr,
    D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """scan_q = scale [basis q_nope, q_rope], offset = scale mean . q_nope: BLOCK_M rows (t, h)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    q_ptr += (row // H * stride_qt + row % H * stride_qh)[:, None]
    scan_q_ptr += (row * (R + D_ROPE))[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, D_NOPE, _STEP):
        channel = start + tl.arange(0, _STEP)
        is_channel = channel < D_NOPE
        q = tl.load(q_ptr + channel, mask=is_row[:, None] & is_channel[None, :], other=0.0)
        at = basis_ptr + (rank * D_NOPE)[:, None] + channel[None, :]
        basis = tl.load(at, mask=(rank < R)[:, None] & is_channel[None, :], other=0.0)
        acc = tl.dot(q, tl.trans(basis), acc=acc, input_precision="ieee")
        mean = tl.load(mean_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        offset += tl.sum(q.to(tl.float32) * mean[None, :], 1)
    out = (acc * scale).to(scan_q_ptr.dtype.element_ty)
    tl.store(scan_q_ptr + rank[None, :], out, mask=is_row[:, None] & (rank < R)[None, :])
    if tl.program_id(1) == 0:
        tl.store(offset_ptr + row, offset * scale, mask=is_row)
        turn = tl.arange(0, BLOCK_ROPE)[None, :]
        mask = is_row[:, None] & (turn < D_ROPE)
        rope = tl.load(q_ptr + D_NOPE + turn, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(scan_q_ptr + R + turn, rope.to(scan_q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["b", "max_blocks", "stride_table", "topk"])
def _lowrank_slots_kernel(
    position_ptr,  # [t, topk] int32, -1 = none
    table_ptr,
    cu_seqlens_q_ptr,
    slot_ptr,  # like position
    b,
    max_blocks,
    stride_table,
    topk,  # follows the longest request of a step: a constant would be compiled in mid-service
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Slots of one row's positions; -1 stays -1."""
    row = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)
    ends = tl.load(cu_seqlens_q_ptr + 1 + request, mask=request < b, other=2147483647)
    # rows behind the last request's have no keys to look up
    request = tl.minimum(tl.sum((ends <= row).to(tl.int32), 0), b - 1)
    for start in range(0, topk, BLOCK_K):
        rank = start + tl.arange(0, BLOCK_K)
        at = row.to(tl.int64) * topk + rank
        position = tl.load(position_ptr + at, mask=rank < topk, other=-1)
        is_key = (position >= 0) & (position < max_blocks * BLOCK_SIZE)
        address = table_ptr + request.to(tl.int64) * stride_table + position // BLOCK_SIZE
        block = tl.load(address, mask=is_key, other=0)
        slot = tl.where(is_key, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(slot_ptr + at, slot, mask=rank < topk)


@triton.jit
def _log_add_exp(a, b):
    """ln(e^a + e^b); -inf if both are, NaN if one is."""
    largest = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    is_infinite = (largest == float("inf")) | (largest == float("-inf"))
    base = tl.where(is_infinite, 0.0, largest)
    total = tl.where(is_infinite, 1.0, tl.exp(a - base) + tl.exp(b - base))
    return tl.where(is_infinite, largest, base + tl.log(total))


@triton.jit(do_not_specialize=["num_rows"])
def _lowrank_merge_kernel(
    core_ptr,  # [t, H, VALUE_DIM] fp32
    core_lse_ptr,  # [t, H] fp32
    rest_ptr,  # [t, H, R or R + D_ROPE]
    rest_lse_ptr,  # [t, H] fp32, without the offset
    offset_ptr,  # [t, H] fp32
    sink_ptr,  # None or [H] fp32
    basis_ptr,
    mean_ptr,
    out_ptr,  # like core
    lse_ptr,  # [t, H] fp32
    num_rows,
    H: tl.constexpr,
    R: tl.constexpr,
    D_NOPE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    REST_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One softmax of core and rest: BLOCK_M rows (t, h), BLOCK_C channels of either kind."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    core_lse = tl.load(core_lse_ptr + row, mask=is_row, other=float("-inf"))
    rest_lse = tl.load(rest_lse_ptr + row, mask=is_row, other=float("-inf"))
    rest_lse += tl.load(offset_ptr + row, mask=is_row, other=0.0)
    lse = _log_add_exp(core_lse, rest_lse)
    total = lse
    if sink_ptr is not None:
        total = _log_add_exp(lse, tl.load(sink_ptr + row % H, mask=is_row, other=0.0))
    total = tl.where(total == float("-inf"), 0.0, total)
    core_weight, rest_weight = tl.exp(core_lse - total), tl.exp(rest_lse - total)
    tile = tl.program_id(1)
    NOPE_TILES: tl.constexpr = (D_NOPE + BLOCK_C - 1) // BLOCK_C
    if tile == 0:
        tl.store(lse_ptr + row, lse, mask=is_row)
    rest_ptr += (row * REST_DIM)[:, None]
    if tile < NOPE_TILES:
        channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        is_channel = channel < D_NOPE
        rest = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, R, _STEP):
            rank = start + tl.arange(0, _STEP)
            is_rank = rank < R
            z = tl.load(rest_ptr + rank, mask=is_row[:, None] & is_rank[None, :], other=0.0)
            at = basis_ptr + (rank * D_NOPE)[:, None] + channel[None, :]
            basis = tl.load(at, mask=is_rank[:, None] & is_channel[None, :], other=0.0)
            rest = tl.dot(z, basis, acc=rest, input_precision="ieee")
        rest += tl.load(mean_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    else:
        channel = D_NOPE + (tile - NOPE_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
        is_channel = channel < VALUE_DIM
        mask = is_row[:, None] & is_channel[None, :]
        rest = tl.load(rest_ptr + (R - D_NOPE) + channel, mask=mask, other=0.0).to(tl.float32)
    mask = is_row[:, None] & is_channel[None, :]
    at = (row * VALUE_DIM)[:, None] + channel[None, :]
    core = tl.load(core_ptr + at, mask=mask, other=0.0)
    out = core * core_weight[:, None] + rest * rest_weight[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)

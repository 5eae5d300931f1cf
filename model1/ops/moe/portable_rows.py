"""Triton kernels around the experts' products: rows to their experts and back, and SwiGLU.

A token's row is written to the places of its choices, the weight of a choice is multiplied into
SwiGLU's result (the product that follows is linear), and the rows of a token's choices are added in
fp32 in the order of the choices. Nothing is atomic.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to

# Channels of a program; others were not measured.
WIDEST = 2048
SWIGLU_BLOCK = 1024


@triton.jit
def _dispatch_kernel(
    x_ptr, weight_ptr, position_ptr, rows_ptr, row_weight_ptr, c, stride_x,
    TOPK: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < c
    x = tl.load(x_ptr + token * stride_x + channel, mask=is_channel, other=0.0)
    for choice in range(TOPK):
        position = tl.load(position_ptr + token * TOPK + choice).to(tl.int64)
        is_row = position >= 0
        tl.store(rows_ptr + position * c + channel, x, mask=is_channel & is_row)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + token * TOPK + choice).to(tl.float32)
            is_first = is_row & (tl.program_id(1) == 0)
            tl.store(row_weight_ptr + position, weight, mask=is_first)


@triton.jit
def _combine_kernel(
    rows_ptr, position_ptr, out_ptr, d_row_weight_ptr, d_weight_ptr, c,
    TOPK: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # out [t, c]: the sum of a token's rows; with HAS_WEIGHT also d_weight [t, TOPK] of its rows
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < c
    total = tl.zeros((BLOCK_C,), tl.float32)
    for choice in range(TOPK):
        position = tl.load(position_ptr + token * TOPK + choice).to(tl.int64)
        is_row = position >= 0
        row = rows_ptr + position * c + channel
        total += tl.load(row, mask=is_channel & is_row, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            grad = tl.load(d_row_weight_ptr + position, mask=is_row, other=0.0)
            where = d_weight_ptr + token * TOPK + choice
            tl.store(where, grad.to(d_weight_ptr.dtype.element_ty), mask=tl.program_id(1) == 0)
    out = round_to(total, DTYPE, INTERPRETED)
    tl.store(out_ptr + token * c + channel, out, mask=is_channel)


@triton.jit
def _load_gates(h_ptr, row, m, column, is_column, limit, HAS_LIMIT: tl.constexpr):
    """Gate and up after their clamps, and whether each passes its gradient; NaN stays NaN."""
    h = h_ptr + row * (2 * m) + column
    gate = tl.load(h, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(h + m, mask=is_column, other=0.0).to(tl.float32)
    passes_gate, passes_up = is_column, is_column
    if HAS_LIMIT:
        passes_gate = gate <= limit
        passes_up = (up >= -limit) & (up <= limit)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up, passes_gate, passes_up


@triton.jit
def _swiglu_kernel(
    h_ptr, row_weight_ptr, end_ptr, out_ptr, m, limit,
    HAS_LIMIT: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # out [rows, m] = weight silu(gate) up of h [rows, 2 m]; end: how many rows there are
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end_ptr):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, _, _ = _load_gates(h_ptr, row, m, column, column < m, limit, HAS_LIMIT)
    out = gate * tl.sigmoid(gate) * up * tl.load(row_weight_ptr + row)
    tl.store(out_ptr + row * m + column, round_to(out, DTYPE, INTERPRETED), mask=column < m)


@triton.jit
def _swiglu_back_kernel(
    grad_ptr, h_ptr, row_weight_ptr, end_ptr, out_ptr, d_h_ptr, d_row_weight_ptr, m, limit,
    HAS_LIMIT: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # writes what the forward kernel wrote once more, the gradient of h and that of the weight
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end_ptr):
        return
    weight = tl.load(row_weight_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, m, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < m
        gate, up, passes_gate, passes_up = _load_gates(
            h_ptr, row, m, column, is_column, limit, HAS_LIMIT
        )
        grad = tl.load(grad_ptr + row * m + column, mask=is_column, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        out = round_to(silu * up * weight, DTYPE, INTERPRETED)
        tl.store(out_ptr + row * m + column, out, mask=is_column)
        grad *= weight
        d_gate = tl.where(passes_gate, grad * up * (sigmoid + silu * (1.0 - sigmoid)), 0.0)
        d_up = tl.where(passes_up, grad * silu, 0.0)
        d_h = d_h_ptr + row * (2 * m) + column
        tl.store(d_h, round_to(d_gate, DTYPE, INTERPRETED), mask=is_column)
        tl.store(d_h + m, round_to(d_up, DTYPE, INTERPRETED), mask=is_column)
    tl.store(d_row_weight_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _zero_empty_kernel(out_ptr, ends_ptr, size, BLOCK: tl.constexpr):
    # zeros where an expert has no rows: out [experts, size]
    expert = tl.program_id(0)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if end > start:
        return
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    zero = tl.zeros((BLOCK,), dtype)
    for first in range(tl.program_id(1) * BLOCK, size, BLOCK * tl.num_programs(1)):
        where = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + expert.to(tl.int64) * size + where, zero, mask=where < size)


def dispatch(
    x: Tensor, positions: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows [t * topk, c] of x [t, c] at the positions of its choices, and their weights fp32.

    What no choice has for its place is not written. Without weights the second is empty.
    """
    (t, c), topk = x.shape, positions.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = torch.empty(t * topk, c, dtype=x.dtype, device=x.device)
    has_weight = weights is not None
    size = t * topk if has_weight else 0
    row_weight = torch.empty(size, dtype=torch.float32, device=x.device)
    block, warps = channel_block(c)
    kernel: Any = _dispatch_kernel
    with torch.cuda.device_of(x):
        kernel[(t, -(-c // block))](
            x, weights.contiguous() if weights is not None else x, positions, rows, row_weight,
            c, x.stride(0), TOPK=topk, HAS_WEIGHT=has_weight, BLOCK_C=block,
            **launch_options(warps, 1),
        )  # fmt: skip
    return rows, row_weight


def combine(
    rows: Tensor, positions: Tensor, d_row_weight: Tensor | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of each token's rows [t, c], and from d_row_weight the same [t, topk], else empty."""
    (t, topk), c = positions.shape, rows.shape[1]
    out = torch.empty(t, c, dtype=rows.dtype, device=rows.device)
    has_weight = d_row_weight is not None
    shape = (t, topk) if has_weight else (0,)
    d_weight = torch.empty(shape, dtype=weight_dtype, device=rows.device)
    block, warps = channel_block(c)
    kernel: Any = _combine_kernel
    with torch.cuda.device_of(rows):
        kernel[(t, -(-c // block))](
            rows, positions, out, d_row_weight if has_weight else d_weight, d_weight, c,
            TOPK=topk, HAS_WEIGHT=has_weight, BLOCK_C=block,
            INTERPRETED=knobs.runtime.interpret, **launch_options(warps, 1),
        )  # fmt: skip
    return out, d_weight


def swiglu_rows(h: Tensor, row_weight: Tensor, ends: Tensor, limit: float | None) -> Tensor:
    """weight silu(gate) up [rows, m] of h [rows, 2 m]; rows behind the last end: unwritten."""
    rows, m = h.shape[0], h.shape[1] // 2
    out = torch.empty(rows, m, dtype=h.dtype, device=h.device)
    block = min(SWIGLU_BLOCK, triton.next_power_of_2(m))
    kernel: Any = _swiglu_kernel
    with torch.cuda.device_of(h):
        kernel[(rows, -(-m // block))](
            h, row_weight, ends[-1:], out, m, limit or 0.0, HAS_LIMIT=limit is not None,
            BLOCK=block, INTERPRETED=knobs.runtime.interpret, **launch_options(4, 1),
        )  # fmt: skip
    return out


def swiglu_rows_backward(
    grad: Tensor, h: Tensor, row_weight: Tensor, ends: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `swiglu_rows`, d_h and d_row_weight; rows as there."""
    rows, m = grad.shape
    out, d_h, d_row_weight = (
        torch.empty_like(grad),
        torch.empty_like(h),
        torch.empty_like(row_weight),
    )
    block = min(SWIGLU_BLOCK, triton.next_power_of_2(m))
    kernel: Any = _swiglu_back_kernel
    with torch.cuda.device_of(h):
        kernel[(rows,)](
            grad, h, row_weight, ends[-1:], out, d_h, d_row_weight, m, limit or 0.0,
            HAS_LIMIT=limit is not None, BLOCK=block, INTERPRETED=knobs.runtime.interpret,
            **launch_options(4, 1),
        )  # fmt: skip
    return out, d_h, d_row_weight


def zero_empty(out: Tensor, ends: Tensor) -> None:
    """Write zeros into the matrices out [experts, n, k] of experts without rows."""
    size = out.shape[1] * out.shape[2]
    kernel: Any = _zero_empty_kernel
    with torch.cuda.device_of(out):
        kernel[(out.shape[0], min(32, -(-size // 1024)))](out, ends, size, BLOCK=1024)


def channel_block(c: int) -> tuple[int, int]:
    """Channels and warps of a program that moves rows of c channels."""
    block = min(WIDEST, int(triton.next_power_of_2(c)))
    return block, max(1, min(8, block // 256))


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 2048 channels in bf16, six choices, experts of 1408."""
    block, warps = channel_block(2048)
    rows = {"c": 2048, "TOPK": 6, "BLOCK_C": block, "stride_x": 2048, "HAS_WEIGHT": True}
    gates = {"m": 1408, "BLOCK": SWIGLU_BLOCK, "HAS_LIMIT": True}
    cases = []
    for name, kernel, constants, num_warps in (
        ("dispatch", _dispatch_kernel, rows, warps),
        ("combine", _combine_kernel, rows, warps),
        ("swiglu", _swiglu_kernel, gates, 4),
        ("swiglu back", _swiglu_back_kernel, gates, 4),
        ("zero empty", _zero_empty_kernel, {"BLOCK": 1024}, 4),
    ):
        known = constants | {"INTERPRETED": False}
        known = {k: v for k, v in known.items() if k in kernel.arg_names}
        types = {k: _TYPES.get(k, "*bf16" if k.endswith("_ptr") else "i32")
                 for k in kernel.arg_names}  # fmt: skip
        types |= dict.fromkeys(known, "constexpr")
        cases.append(CompileCase(name, kernel, types, known, num_warps, 1))
    return cases


_TYPES = {
    "weight_ptr": "*fp32", "row_weight_ptr": "*fp32", "d_row_weight_ptr": "*fp32",
    "d_weight_ptr": "*fp32", "position_ptr": "*i32", "end_ptr": "*i32", "ends_ptr": "*i32",
    "limit": "fp32",
}  # fmt: skip

"""Routed experts on a GPU: Triton kernels around grouped products, our own or PyTorch's.

Choices are ordered by expert on the device; no product has a size that the host would have to ask
for. What an operator keeps for its gradient is h, the experts' first product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.grouped_matmul.portable import grouped_matmul, grouped_outer
from model1.ops.moe.portable_rows import (
    combine,
    dispatch,
    swiglu_rows,
    swiglu_rows_backward,
    zero_empty,
)
from model1.ops.moe.portable_sort import sort_choices

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def moe_experts_triton(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, *,
    swiglu_limit: float | None,
) -> Results:  # fmt: skip
    """out of `model1.ops.moe.moe_experts`, then h, positions, ends and the rows' weights."""
    return _experts(x, weights, expert_ids, gate_up, down, swiglu_limit, use_torch=False)


def moe_experts_grouped_mm(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, *,
    swiglu_limit: float | None,
) -> Results:  # fmt: skip
    """The same with PyTorch's products."""
    return _experts(x, weights, expert_ids, gate_up, down, swiglu_limit, use_torch=True)


def moe_experts_backward_triton(
    grad: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, h: Tensor,
    positions: Tensor, ends: Tensor, row_weight: Tensor, *, swiglu_limit: float | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, gate_up and down; empty ones where none is needed."""
    saved = (x, weights, gate_up, down, h, positions, ends, row_weight)
    return _backward(grad, *saved, swiglu_limit, needs, use_torch=False)


def moe_experts_backward_grouped_mm(
    grad: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, h: Tensor,
    positions: Tensor, ends: Tensor, row_weight: Tensor, *, swiglu_limit: float | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with PyTorch's products."""
    saved = (x, weights, gate_up, down, h, positions, ends, row_weight)
    return _backward(grad, *saved, swiglu_limit, needs, use_torch=True)


def _experts(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor,
    limit: float | None, *, use_torch: bool,
) -> Results:  # fmt: skip
    positions, ends = sort_choices(expert_ids, gate_up.shape[0])
    if expert_ids.numel() == 0:
        h = x.new_empty(0, gate_up.shape[1])
        return torch.zeros_like(x), h, positions, ends, weights.new_empty(0, dtype=torch.float32)
    rows, row_weight = dispatch(x, positions, weights)
    h = _product(rows, gate_up, ends, use_torch=use_torch)
    del rows
    out = _product(swiglu_rows(h, row_weight, ends, limit), down, ends, use_torch=use_torch)
    return combine(out, positions)[0], h, positions, ends, row_weight


def _backward(
    grad: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, h: Tensor,
    positions: Tensor, ends: Tensor, row_weight: Tensor, limit: float | None,
    needs: tuple[bool, ...], *, use_torch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_gate_up, d_down = x.new_empty(0), x.new_empty(0)
    if positions.numel() == 0:
        d_gate_up = torch.zeros_like(gate_up) if needs[2] else d_gate_up
        d_down = torch.zeros_like(down) if needs[3] else d_down
        return torch.zeros_like(x), torch.zeros_like(weights), d_gate_up, d_down
    d_rows, _ = dispatch(grad, positions)
    d_act = _product(d_rows, down, ends, use_torch=use_torch, transposed=True)
    act, d_h, d_row_weight = swiglu_rows_backward(d_act, h, row_weight, ends, limit)
    if needs[3]:
        d_down = _outer(d_rows, act, ends, use_torch=use_torch)
    del d_rows, d_act, act
    d_x = _product(d_h, gate_up, ends, use_torch=use_torch, transposed=True)
    d_x, d_weights = combine(d_x, positions, d_row_weight, weights.dtype)
    if needs[2]:
        d_gate_up = _outer(d_h, dispatch(x, positions)[0], ends, use_torch=use_torch)
    return d_x, d_weights, d_gate_up, d_down


def _product(
    rows: Tensor, weight: Tensor, ends: Tensor, *, use_torch: bool, transposed: bool = False
) -> Tensor:  # fmt: skip
    """rows [r, k] times the transposes of weight [e, n, k], or `transposed` weight [e, k, n]."""
    if not use_torch:
        return grouped_matmul(rows, weight, ends, transpose_b=transposed)
    weight = weight if transposed else weight.transpose(1, 2)
    return torch.nn.functional.grouped_mm(rows, weight, offs=ends)


def _outer(y: Tensor, x: Tensor, ends: Tensor, *, use_torch: bool) -> Tensor:
    """[e, n, k] of rows y [r, n] and x [r, k]."""
    if not use_torch:
        return grouped_outer(y, x, ends)
    out = torch.nn.functional.grouped_mm(y.t(), x, offs=ends)
    zero_empty(out, ends)  # which not every GPU's kernel writes: pytorch/pytorch issue 172439
    return out

"""Routed experts on FP8 units: the kernels of `portable`; rows are quantised before a product."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.fp8_linear.portable import fp8_quantize_triton
from model1.ops.grouped_matmul.portable import Scales, grouped_matmul
from model1.ops.moe.portable_rows import combine, dispatch, swiglu_rows
from model1.ops.moe.portable_sort import sort_choices


def moe_experts_fp8_triton(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, *, swiglu_limit: float | None,
) -> Tensor:  # fmt: skip
    """As `model1.ops.moe.ref.moe_experts_fp8_ref`."""
    if expert_ids.numel() == 0:
        return torch.zeros_like(x)
    positions, ends = sort_choices(expert_ids, gate_up.shape[0])
    rows, row_weight = dispatch(x, positions, weights)
    h = _product(rows, gate_up, gate_up_scale, ends)
    act = swiglu_rows(h, row_weight, ends, swiglu_limit)
    return combine(_product(act, down, down_scale, ends), positions)[0]


def _product(rows: Tensor, codes: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    # rows behind the last end hold anything: they are quantised, and read by no product
    x_fp8, x_scale, _, _ = fp8_quantize_triton(rows, kind="rows", power_of_two=True)
    scales = Scales(x_scale, scale, b_is_blocks=True)
    out = grouped_matmul(x_fp8[: len(rows)], codes, ends, out_dtype=rows.dtype, scales=scales)
    return out

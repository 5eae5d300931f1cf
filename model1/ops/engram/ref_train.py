"""Plain PyTorch for the training of a table's rows: the oracles of `row_adam`."""

from __future__ import annotations

import torch
from torch import Tensor


def engram_sum_rows_ref(grads: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Sums [u, dim] of runs of grads [m, dim] in `order` [m]; run i ends before ends[i]."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    run = torch.searchsorted(ends, torch.arange(len(order), device=grads.device), right=True)
    sums = grads.new_zeros((len(ends), grads.shape[1]), dtype=wide)
    return sums.index_add_(0, run, grads.index_select(0, order).to(wide))


def engram_row_adam_ref(
    table: Tensor, mean: Tensor, square: Tensor, steps: Tensor, rows: Tensor, grads: Tensor,
    lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """See `model1.ops.engram.row_adam.row_adam_step`."""
    touched = (grads != 0).any(dim=1) & (rows >= 0)
    rows, grads = rows[touched], grads[touched]
    m, v, n = (x.index_select(0, rows) for x in (mean, square, steps))
    # tensors as weights: PyTorch rounds them to fp32 then, as it does the numbers
    m.lerp_(grads, torch.full_like(n, 1.0 - beta1))
    v.lerp_(grads * grads, torch.full_like(n, 1.0 - beta2))
    n += 1
    update = m / (1.0 - beta1**n) / ((v / (1.0 - beta2**n)).sqrt() + eps)
    moved = (table.index_select(0, rows).float() - lr * update).to(table.dtype)
    for tensor, values in ((table, moved), (mean, m), (square, v), (steps, n)):
        tensor.index_copy_(0, rows, values)

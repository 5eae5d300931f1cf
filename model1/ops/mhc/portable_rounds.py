"""Triton device functions for mixing matrices, [tokens, SIZE, SIZE] in registers.

SIZE is n rounded up to a power of two. What lies beyond n stays 0, so that every sum may run over
all of it. The rounds are those of `model1.ops.mhc.ref.sinkhorn_ref`, in the same order.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vector_columns(N: tl.constexpr, SIZE: tl.constexpr):
    """Columns of `pre` among the projection's, [1, SIZE], and which of them exist."""
    column = tl.arange(0, SIZE)[None, :]
    return column, column < N


@triton.jit
def matrix_columns(N: tl.constexpr, SIZE: tl.constexpr):
    """Columns of `comb` counted from its first, [1, SIZE, SIZE] row-major, and which exist."""
    row, column = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    return row * N + column, (row < N) & (column < N)


@triton.jit
def row_softmax(logits, is_entry, N: tl.constexpr):
    """Softmax over the last axis, 0 where is_entry [1, SIZE, SIZE] is not."""
    column = tl.arange(0, logits.shape[2])[None, None, :]
    logits = tl.where(column < N, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=2, keep_dims=True))
    return tl.where(is_entry, weights / tl.sum(weights, axis=2, keep_dims=True), 0.0)


@triton.jit
def normalised(comb, is_entry, eps, AXIS: tl.constexpr):
    """comb over its sums along an axis, each plus eps: 1 makes columns sum to 1, 2 rows."""
    total = tl.sum(comb, axis=AXIS, keep_dims=True) + eps
    return tl.where(is_entry, comb / total, 0.0)

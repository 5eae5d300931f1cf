"""Triton device functions for mixing matrices held by one thread a token, and their gradients.

A matrix is a tuple of its n * n entries row by row, each [tokens]; the rounds are those of
`model1.ops.mhc.ref.sinkhorn_ref`, in the same order.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type, and loops over
# tl.static_range exist only when compiled.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_columns(ptr, is_token, FIRST: tl.constexpr, NUM: tl.constexpr):
    """NUM neighbouring numbers of each token, whose first is at ptr + FIRST, in fp32."""
    values = ()
    for i in tl.static_range(NUM):
        values += (tl.load(ptr + FIRST + i, mask=is_token, other=0.0).to(tl.float32),)
    return values


@triton.jit
def affine_entries(z, scale_ptr, bias_ptr, FIRST: tl.constexpr, NUM: tl.constexpr):
    """NUM columns of z from FIRST on, times the scale of each plus its bias."""
    values = ()
    for i in tl.static_range(NUM):
        scale = tl.load(scale_ptr + FIRST + i).to(tl.float32)
        values += (z[FIRST + i] * scale + tl.load(bias_ptr + FIRST + i).to(tl.float32),)
    return values


@triton.jit
def row_softmaxes(logits, N: tl.constexpr):
    """Softmax of each row."""
    values = ()
    for j in tl.static_range(N):
        largest = logits[j * N]
        for k in tl.static_range(1, N):
            largest = tl.maximum(largest, logits[j * N + k])
        total = tl.zeros_like(largest)
        row = ()
        for k in tl.static_range(N):
            row += (tl.exp(logits[j * N + k] - largest),)
            total += row[k]
        inverse = 1.0 / total
        for k in tl.static_range(N):
            values += (row[k] * inverse,)
    return values


@triton.jit
def row_softmaxes_bwd(grad, softmax, N: tl.constexpr):
    """Gradient of the logits."""
    values = ()
    for j in tl.static_range(N):
        along = grad[j * N] * softmax[j * N]
        for k in tl.static_range(1, N):
            along = tl.fma(grad[j * N + k], softmax[j * N + k], along)
        for k in tl.static_range(N):
            values += (softmax[j * N + k] * (grad[j * N + k] - along),)
    return values


@triton.jit
def _line(values, i, IS_COLUMN: tl.constexpr, N: tl.constexpr):
    """Column or row i."""
    line = ()
    for k in tl.static_range(N):
        line += (values[k * N + i] if IS_COLUMN else values[i * N + k],)
    return line


@triton.jit
def _from_lines(lines, IS_COLUMN: tl.constexpr, N: tl.constexpr):
    """The matrix whose columns or rows follow each other in lines."""
    values = ()
    for j in tl.static_range(N):
        for k in tl.static_range(N):
            values += (lines[k * N + j] if IS_COLUMN else lines[j * N + k],)
    return values


@triton.jit
def divided_round(comb, totals, stride, eps, IS_COLUMN: tl.constexpr, N: tl.constexpr):
    """comb over the sums of its columns or rows, each plus eps, which go to totals [N, tokens]."""
    lines = ()
    for i in tl.static_range(N):
        line = _line(comb, i, IS_COLUMN, N)
        total = line[0]
        for k in tl.static_range(1, N):
            total += line[k]
        total += eps
        tl.store(totals + i * stride, total)
        inverse = 1.0 / total  # once a line: divisions take longest here
        for k in tl.static_range(N):
            lines += (line[k] * inverse,)
    return _from_lines(lines, IS_COLUMN, N)


@triton.jit
def divided_round_bwd(grad, comb, totals, stride, IS_COLUMN: tl.constexpr, N: tl.constexpr):
    """Gradient of what `divided_round` took, and that itself, from its result comb."""
    grads, before = (), ()
    for i in tl.static_range(N):
        total = tl.load(totals + i * stride)
        line, result = _line(grad, i, IS_COLUMN, N), _line(comb, i, IS_COLUMN, N)
        along = line[0] * result[0]
        for k in tl.static_range(1, N):
            along = tl.fma(line[k], result[k], along)
        inverse = 1.0 / total
        for k in tl.static_range(N):
            grads += ((line[k] - along) * inverse,)
            before += (result[k] * total,)
    return _from_lines(grads, IS_COLUMN, N), _from_lines(before, IS_COLUMN, N)

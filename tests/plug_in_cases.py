"""Calls of hyper-connections for `test_plug_in`, on a backend and a device."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.mhc import mhc_coefficients, mhc_collapse, mhc_head, mhc_write_back
from model1.ops.mhc.chain import mhc_collapse_norm, mhc_enter, mhc_seam
from model1.ops.mhc.single_pass import mhc_write_back_collapse_norm


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape).to(device)


def mixed(backend: str, device: str) -> list[Tensor]:
    """Hyper-connections of a sublayer, forward and backward."""
    shapes = (5, 4, 24), (24, 96), (24,), (24,), (5, 24)
    x, phi, scale, bias, y = (random(*s, device=device).requires_grad_() for s in shapes)
    options = {"iters": 5, "eps": 1e-6, "norm_eps": 1e-6, "backend": backend}
    weights = mhc_coefficients(x, phi, scale, bias, **options)
    collapsed = mhc_collapse(x, weights.pre, backend=backend)
    written = mhc_write_back(x, y, weights.post, weights.comb, backend=backend)
    grads = [random(*result.shape, device=device) for result in (collapsed, written)]
    leaves = [x, phi, scale, bias, y]
    return [*weights, collapsed, written, *torch.autograd.grad([collapsed, written], leaves, grads)]


def mixed_in_a_row(backend: str, device: str) -> list[Tensor]:
    """The fused ones of two sublayers in a row, forward and backward."""
    shapes = (5, 4, 24), (24, 96), (24,), (24,), (5, 24), (5, 4), (5, 4, 4), (24,)
    leaves = [random(*s, device=device).requires_grad_() for s in shapes]
    x, phi, scale, bias, y, pre, comb, weight = leaves
    u, x = mhc_collapse_norm(x, pre, weight, norm_eps=1e-6, backend=backend)
    options = {"iters": 5, "eps": 1e-6, "norm_eps": 1e-6, "backend": backend}
    x, *start = mhc_seam(x, y, pre, comb, phi, scale, bias, weight, **options)
    results = [u, *start, *mhc_enter(x, phi, scale, bias, weight, **options)]
    grads = [random(*result.shape, device=device) for result in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def left(backend: str, device: str) -> list[Tensor]:
    """The weights of the streams' exit, forward and backward."""
    shapes = (5, 4, 24), (4, 96), (1,), (4,)
    leaves = [random(*s, device=device).requires_grad_() for s in shapes]
    pre = mhc_head(*leaves, eps=1e-6, norm_eps=1e-6, backend=backend)
    return [pre, *torch.autograd.grad(pre, leaves, random(*pre.shape, device=device))]


def mixed_in_one_pass(backend: str, device: str) -> list[Tensor]:
    """Write-back, collapse and norm as one operator, forward and backward."""
    shapes = (5, 4, 24), (5, 24), (5, 4), (5, 4, 4), (5, 4), (24,)
    leaves = [random(*s, device=device).requires_grad_() for s in shapes]
    results = mhc_write_back_collapse_norm(*leaves, norm_eps=1e-6, backend=backend)
    grads = [random(*result.shape, device=device) for result in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]

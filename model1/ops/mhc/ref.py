"""Plain PyTorch manifold-constrained hyper-connections."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def sinkhorn_ref(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """See `model1.ops.mhc.sinkhorn`."""
    if logits.device.type == "cpu" and not torch.is_grad_enabled():
        return _sinkhorn_products(logits, iters, eps)
    comb = torch.softmax(logits, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


@functools.cache
def _sum_matrices(n: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices that replace each entry of a flat [n, n] by its row's or column's sum, and eps."""
    ones, eye = torch.ones(n, n), torch.eye(n)
    return torch.kron(eye, ones), torch.kron(ones, eye), torch.full((n * n,), eps)


def _sinkhorn_products(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The same rounds with each sum plus eps as one small matrix product.

    On a CPU a few tokens cost only the number of calls, and this form needs half as many.
    """
    n = logits.shape[-1]
    rows, columns, epsilon = _sum_matrices(n, eps)
    comb = (torch.softmax(logits, dim=-1) + eps).flatten(1)
    comb /= torch.addmm(epsilon, comb, columns)
    for _ in range(iters - 1):
        comb /= torch.addmm(epsilon, comb, rows)
        comb /= torch.addmm(epsilon, comb, columns)
    return comb.unflatten(-1, (n, n))


def mhc_coefficients_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.mhc.mhc_coefficients`."""
    n = x.shape[1]
    flat = x.flatten(1).float()
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    # Multiplying before dividing by the rms gives the same numbers for one pass less.
    z = (flat @ phi.float().T) * inverse_rms
    z = torch.addcmul(bias.float(), z, scale.float())
    pre = torch.sigmoid(z[:, :n]) + eps
    post = 2.0 * torch.sigmoid(z[:, n : 2 * n])
    comb = sinkhorn_ref(z[:, 2 * n :].unflatten(-1, (n, n)), iters=iters, eps=eps)
    return pre, post, comb


def mhc_head_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See `model1.ops.mhc.mhc_head`."""
    flat = x.flatten(1).float()
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    z = torch.addcmul(bias.float(), (flat @ phi.float().T) * inverse_rms, scale.float())
    return torch.sigmoid(z) + eps


def mhc_collapse_ref(x: Tensor, pre: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_collapse`."""
    return (pre.to(x.dtype).unsqueeze(-1) * x).sum(dim=1)


def mhc_write_back_ref(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_write_back`."""
    # Unrolled over the few input streams: products this thin are slow as batched matrix products.
    weights = comb.to(x.dtype).unsqueeze(-1)
    out = post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(1)
    for j in range(x.shape[1]):
        out = torch.addcmul(out, weights[:, j], x[:, j].unsqueeze(1))
    return out

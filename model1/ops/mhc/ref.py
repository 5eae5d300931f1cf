"""Plain PyTorch manifold-constrained hyper-connections.

Where a CPU records no gradient the Sinkhorn rounds run in NumPy: a few tokens cost only the number
of calls, and there are dozens of them in every sublayer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.norm import over_rms
from model1.ops.ragged import counts_calls


def sinkhorn_ref(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """See `model1.ops.mhc.sinkhorn`."""
    comb = torch.softmax(logits, dim=-1)
    if logits.dtype == torch.float32 and counts_calls(logits):
        return torch.from_numpy(_sinkhorn_rounds(comb.numpy(), iters, eps))
    comb = comb + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def _sinkhorn_rounds(softmax: np.ndarray, iters: int, eps: float) -> np.ndarray:
    """The same rounds on [t, n, n] fp32, each sum starting from eps.

    Tokens lie last meanwhile: sums over either other axis add whole rows of them.
    """
    if len(softmax) == 1:  # NumPy adds up a lone token in another order
        return _sinkhorn_rounds(np.concatenate([softmax, softmax]), iters, eps)[:1]
    comb = np.ascontiguousarray(softmax.transpose(1, 2, 0))
    comb = comb + np.float32(eps)
    n, _, t = comb.shape
    columns, rows = np.empty((1, n, t), np.float32), np.empty((n, 1, t), np.float32)
    start, add_up = np.float32(eps), np.add.reduce
    for i in range(2 * iters - 1):
        sums = rows if i % 2 else columns
        # axis, dtype, out, keepdims, initial: by name they would cost a tenth more
        np.divide(comb, add_up(comb, i % 2, None, sums, True, start), comb)
    return np.ascontiguousarray(comb.transpose(2, 0, 1))


def mhc_coefficients_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.mhc.mhc_coefficients`."""
    n = x.shape[1]
    z = _scaled_product(x, phi, scale, bias, norm_eps)
    pre, post, comb = z.split_with_sizes((n, n, n * n), dim=-1)
    pre, post = torch.sigmoid(pre) + eps, 2.0 * torch.sigmoid(post)
    return pre, post, sinkhorn_ref(comb.view(-1, n, n), iters=iters, eps=eps)


def mhc_head_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See `model1.ops.mhc.mhc_head`."""
    return torch.sigmoid(_scaled_product(x, phi, scale, bias, norm_eps)) + eps


def _scaled_product(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, norm_eps: float) -> Tensor:
    """scale * (phi flat(x)) / rms(flat(x)) + bias, one row a token."""
    flat = x.flatten(1).float()
    # Multiplying before dividing by the rms gives the same numbers for one pass less.
    z = over_rms(F.linear(flat, phi.float()), flat, norm_eps)
    return torch.addcmul(bias.float(), z, scale.float())


def mhc_collapse_ref(x: Tensor, pre: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_collapse`."""
    weights = pre.type_as(x)
    if x.is_cpu:
        return torch.bmm(weights.unsqueeze(1), x).squeeze(1)
    return (weights.unsqueeze(-1) * x).sum(dim=1)


def mhc_write_back_ref(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_write_back`."""
    out = post.type_as(x).unsqueeze(-1) * y.unsqueeze(1)
    if x.is_cpu:
        return torch.baddbmm(out, comb.type_as(x).mT, x)
    # Unrolled over the few input streams: a GPU is slow at products this thin.
    weights = comb.type_as(x).unsqueeze(-1)
    for j in range(x.shape[1]):
        out = torch.addcmul(out, weights[:, j], x[:, j].unsqueeze(1))
    return out

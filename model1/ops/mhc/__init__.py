"""Manifold-constrained hyper-connections: n residual streams with doubly-stochastic mixing.

    u = sum_i pre_i x_i;   y = F(u);   x'_k = post_k y + sum_j comb[j, k] x_j

Column order of the projection is [pre n | post n | comb n*n row-major]; comb is not symmetric.
Source: arXiv 2512.24880, with the row softmax and epsilons of DeepSeek-V4's release.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from model1.ops.mhc.ref import (
    mhc_coefficients_ref,
    mhc_collapse_ref,
    mhc_head_ref,
    mhc_write_back_ref,
    sinkhorn_ref,
)


class MhcCoefficients(NamedTuple):
    """Mixing weights of one sublayer, all fp32."""

    pre: Tensor  # [t, n]
    post: Tensor  # [t, n]
    comb: Tensor  # [t, n, n], row = input stream, column = output stream; columns sum to 1


def sinkhorn(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """Nearly doubly-stochastic matrices from logits [t, n, n].

    softmax over rows plus eps, one column normalisation, then iters - 1 rounds of (row, column)
    normalisation; it ends on columns. Differentiable through every round.
    """
    if logits.dim() != 3 or logits.shape[1] != logits.shape[2]:
        raise ValueError(f"logits must be [t, n, n], got {list(logits.shape)}")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters}")
    return sinkhorn_ref(logits, iters=iters, eps=eps)


def mhc_coefficients(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, iters: int, eps: float, norm_eps: float
) -> MhcCoefficients:
    """Coefficients of one sublayer from the streams x [t, n, c].

    z = scale * (phi flat(x)) / rms(flat(x)) + bias; pre = sigmoid + eps; post = 2 sigmoid;
    comb = sinkhorn(z). phi: [n*n + 2n, n*c]; scale: [n*n + 2n], the learned alpha of each column's
    group; bias: [n*n + 2n].
    """
    _, n, c = x.shape
    width = n * n + 2 * n
    if phi.shape != (width, n * c):
        raise ValueError(f"phi must be [{width}, {n * c}], got {list(phi.shape)}")
    if scale.shape != (width,) or bias.shape != (width,):
        raise ValueError(f"scale and bias must be [{width}]")
    return MhcCoefficients(
        *mhc_coefficients_ref(x, phi, scale, bias, iters=iters, eps=eps, norm_eps=norm_eps)
    )


def mhc_head(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """The `pre` weights alone, [t, n] fp32, for the last collapse. phi: [n, n*c]; scale: [1]."""
    n, c = x.shape[1], x.shape[2]
    if phi.shape != (n, n * c) or scale.shape != (1,) or bias.shape != (n,):
        raise ValueError(f"phi must be [{n}, {n * c}], scale [1] and bias [{n}]")
    return mhc_head_ref(x, phi, scale, bias, eps=eps, norm_eps=norm_eps)


def mhc_collapse(x: Tensor, pre: Tensor) -> Tensor:
    """sum_i pre_i x_i: streams [t, n, c] and weights [t, n] to [t, c]."""
    return mhc_collapse_ref(x, pre)


def mhc_write_back(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """x'_k = post_k y + sum_j comb[j, k] x_j: [t, n, c] from x [t, n, c] and y [t, c]."""
    return mhc_write_back_ref(x, y, post, comb)

"""Manifold-constrained hyper-connections: n residual streams with doubly-stochastic mixing.

    u = sum_i pre_i x_i;   y = F(u);   x'_k = post_k y + sum_j comb[j, k] x_j

A model runs them in a row: `model1.ops.mhc.chain` has the operators for that, which fuse them.

Column order of the projection is [pre n | post n | comb n*n row-major]; comb is not symmetric.
Source: arXiv 2512.24880, with the row softmax and epsilons of DeepSeek-V4's release.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.backend import calls_ref_directly
from model1.ops.mhc.checks import (
    check_coefficients,
    check_collapse,
    check_head,
    check_sizes,
    check_write_back,
    usable,
)
from model1.ops.mhc.dispatch import COEFFICIENTS, COLLAPSE, WRITE_BACK
from model1.ops.mhc.head_dispatch import HEAD
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
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *,
    iters: int, eps: float, norm_eps: float, backend: str = "auto",
) -> MhcCoefficients:  # fmt: skip
    """Coefficients of one sublayer from the streams x [t, n, c].

    z = scale * (phi flat(x)) / rms(flat(x)) + bias; pre = sigmoid + eps; post = 2 sigmoid;
    comb = sinkhorn(z). phi: [n*n + 2n, n*c]; scale: [n*n + 2n], the learned alpha of each column's
    group; bias: [n*n + 2n]. Any floating dtypes; computed in fp32.

    t = 0 is allowed, a NaN spoils its token alone, gradients are the same bits every time.
    Differentiable in all four; with kernels once. Raises ValueError for shapes and devices,
    BackendUnavailable for a backend that cannot run here. triton takes up to 8 streams in bf16,
    fp16 or fp32, wherever they and the tokens lie, "auto" the reference for others; a token's last
    bits depend on t and on how far streams and tokens are apart. On a CPU, where no gradient is
    recorded, dtypes are not looked at.
    """
    check_sizes(x, phi, scale, bias, iters)
    name = COEFFICIENTS.resolve(usable(backend, x), x.device)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    if not calls_ref_directly(name):
        check_coefficients(x, phi, scale, bias)
    if name == "ref":
        return MhcCoefficients(*mhc_coefficients_ref(x, phi, scale, bias, **options))
    run = torch.ops.model1.mhc_coefficients
    return MhcCoefficients(*run(x, phi, scale, bias, iters, eps, norm_eps, name)[:3])


def mhc_head(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *,
    eps: float, norm_eps: float, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The `pre` weights alone, [t, n] fp32, for the last collapse. phi: [n, n*c]; scale: [1].

    sigmoid(scale * (phi flat(x)) / rms(flat(x)) + bias) + eps; bias: [n]. Tokens, NaN, gradients,
    backends and errors as in `mhc_coefficients`.
    """
    check_head(x, phi, scale, bias)
    name = HEAD.resolve(usable(backend, x), x.device)
    if not calls_ref_directly(name):
        check_coefficients(x, phi, scale, bias)
    if name == "ref":
        return mhc_head_ref(x, phi, scale, bias, eps=eps, norm_eps=norm_eps)
    return torch.ops.model1.mhc_head(x, phi, scale, bias, eps, norm_eps, name)[0]


def mhc_collapse(x: Tensor, pre: Tensor, *, backend: str = "auto") -> Tensor:
    """sum_i pre_i x_i: streams [t, n, c] and weights [t, n] to [t, c], in the dtype of x.

    Kernels compute in fp32 and round once; the reference rounds pre to the dtype of x first.
    Backends, errors and the rest as in `mhc_coefficients`.
    """
    name = COLLAPSE.resolve(usable(backend, x), x.device)
    if calls_ref_directly(name):
        return mhc_collapse_ref(x, pre)
    check_collapse(x, pre)
    if name == "ref":
        return mhc_collapse_ref(x, pre)
    return torch.ops.model1.mhc_collapse(x, pre, name)


def mhc_write_back(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, *, backend: str = "auto"
) -> Tensor:
    """x'_k = post_k y + sum_j comb[j, k] x_j: [t, n, c] from x [t, n, c] and y [t, c].

    post: [t, n]; comb: [t, n, n]. Rounding, backends, errors and the rest as in `mhc_collapse`.
    """
    name = WRITE_BACK.resolve(usable(backend, x), x.device)
    if calls_ref_directly(name):
        return mhc_write_back_ref(x, y, post, comb)
    check_write_back(x, y, post, comb)
    if name == "ref":
        return mhc_write_back_ref(x, y, post, comb)
    return torch.ops.model1.mhc_write_back(x, y, post, comb, name)

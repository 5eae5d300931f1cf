"""Sublayers in a row: the fused forms of collapse, norm, write-back and coefficients.

    u, x = mhc_collapse_norm(x, weights.pre, norm_weight);   y = F(u)
    x, weights = mhc_write_back_coefficients(x, y, weights.post, weights.comb, phi, scale, bias)

A sublayer reads the streams three times and writes them once, forward. Backward their gradient
passes through each operator once, and PyTorch adds none. The first sublayer's coefficients are
those of `model1.ops.mhc.mhc_coefficients`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import calls_ref_directly
from model1.ops.mhc import MhcCoefficients
from model1.ops.mhc.chain_dispatch import COLLAPSE_NORM, WRITE_BACK_COEFFICIENTS, CollapseNorm
from model1.ops.mhc.checks import (
    check_coefficients,
    check_collapse,
    check_norm,
    check_sizes,
    check_write_back,
    usable,
)
from model1.ops.mhc.ref import mhc_collapse_norm_ref, mhc_write_back_coefficients_ref


def mhc_collapse_norm(
    x: Tensor, pre: Tensor, weight: Tensor, *, norm_eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """u = v / sqrt(mean(v**2) + norm_eps) * weight, v = sum_i pre_i x_i; and x for the write-back.

    x: [t, n, c] in any floating dtype; pre: [t, n]; weight: [c]; u: [t, c] in the dtype of x. The
    second result is x itself: what reads it instead of x hands its gradient to this operator, which
    writes the sum of both. Neither may be changed in place.

    Kernels compute in fp32 and round once; the reference rounds pre, v and weight to the dtype of x
    first. Tokens, NaN, gradients, backends and errors as in `model1.ops.mhc.mhc_coefficients`.
    """
    name = COLLAPSE_NORM.resolve(usable(backend, x), x.device)
    if calls_ref_directly(name):
        return mhc_collapse_norm_ref(x, pre, weight, norm_eps=norm_eps), x
    check_collapse(x, pre)
    check_norm(x, weight)
    if name == "ref":
        return mhc_collapse_norm_ref(x, pre, weight, norm_eps=norm_eps), x
    return CollapseNorm.apply(x, pre, weight, norm_eps, name)


def mhc_write_back_coefficients(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *,
    iters: int, eps: float, norm_eps: float, backend: str = "auto",
) -> tuple[Tensor, MhcCoefficients]:  # fmt: skip
    """x' = `mhc_write_back`(x, y, post, comb), and `mhc_coefficients`(x', phi, scale, bias).

    Shapes and the rest as there; post and comb are this sublayer's, phi, scale and bias the next
    one's. The coefficients are of x' as it is stored, rounded to the dtype of x: they differ from
    those of two calls in the order of sums alone.
    """
    name = WRITE_BACK_COEFFICIENTS.resolve(usable(backend, x), x.device)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    check_sizes(x, phi, scale, bias, iters)
    if not calls_ref_directly(name):
        check_write_back(x, y, post, comb)
        check_coefficients(x, phi, scale, bias)
    if name == "ref":
        out, *weights = mhc_write_back_coefficients_ref(
            x, y, post, comb, phi, scale, bias, **options
        )
        return out, MhcCoefficients(*weights)
    run = torch.ops.model1.mhc_write_back_coefficients
    out, *weights = run(x, y, post, comb, phi, scale, bias, iters, eps, norm_eps, name)[:4]
    return out, MhcCoefficients(*weights)

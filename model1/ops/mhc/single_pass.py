"""Sublayers in a row whose collapse is weighed one sublayer ahead, so that one pass does it all.

    weights = mhc_coefficients(x, phi, scale, bias)
    u, x = mhc_write_back_collapse_norm(x, F(u), weights.post, weights.comb, weights.pre, norm)

X[l+1] = B[l] X[l] + C[l] F[l](A[l-1] X[l]), where A, B and C of l are of X[l]: the weights of the
new streams' collapse are known before these are. The first collapse takes stream 0 alone, the last
sublayer's `pre` weighs the exit.

Source: the single-pass form of DeepSeek-V4.1's release; the standard one is in
`model1.ops.mhc.chain`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import calls_ref_directly
from model1.ops.mhc.checks import check_collapse, check_norm, check_write_back, usable
from model1.ops.mhc.ref import mhc_write_back_collapse_norm_ref
from model1.ops.mhc.single_pass_dispatch import SINGLE_PASS


def mhc_write_back_collapse_norm(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(u', x') of x'_k = post_k y + sum_j comb[j, k] x_j and u' = norm(sum_k pre_k x'_k).

    norm(v) = v / sqrt(mean(v**2) + norm_eps) * weight. x, x': [t, n, c] in any floating dtype;
    y, u': [t, c], the latter in the dtype of x; post, pre: [t, n]; comb: [t, n, n]; weight: [c].

    x and y are read and both results written once: (2 n + 2) c numbers a token; backward, where x'
    and the gradients of both results are read too, (4 n + 3) c, and x' and the gradient of u' again
    for the norm's sums. u' is of x' as it is stored, rounded to the dtype of x;
    else kernels compute in fp32 and round once, and x' has the bits of `mhc_write_back`. The
    reference rounds weights, and v, to the dtype of x first. Differentiable in all six tensors.
    Tokens, NaN, gradients, backends and errors as in `model1.ops.mhc.mhc_coefficients`.
    """
    name = SINGLE_PASS.resolve(usable(backend, x), x.device)
    if calls_ref_directly(name):
        return mhc_write_back_collapse_norm_ref(x, y, post, comb, pre, weight, norm_eps=norm_eps)
    check_write_back(x, y, post, comb)
    check_collapse(x, pre)
    check_norm(x, weight)
    if name == "ref":
        return mhc_write_back_collapse_norm_ref(x, y, post, comb, pre, weight, norm_eps=norm_eps)
    run = torch.ops.model1.mhc_write_back_collapse_norm
    return run(x, y, post, comb, pre, weight, norm_eps, name)

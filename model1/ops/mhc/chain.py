"""Sublayers in a row: what lies between two of them as one operator.

    x, u, post, comb = mhc_seam(x, F(u), post, comb, phi, scale, bias, norm_weight)

writes a sublayer's result back, weighs the new streams and collapses them for the next sublayer.
Forward the streams are read three times and written once; backward their own gradient, which three
operators make and four need, is written nowhere in bf16 with up to four streams. The first sublayer
starts from `mhc_enter`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model1.ops.backend import calls_ref_directly
from model1.ops.mhc.chain_dispatch import COLLAPSE_NORM, ENTER, SEAM, CollapseNorm, Enter
from model1.ops.mhc.checks import (
    check_coefficients,
    check_collapse,
    check_norm,
    check_sizes,
    check_write_back,
    usable,
)
from model1.ops.mhc.ref import mhc_collapse_norm_ref, mhc_enter_ref, mhc_seam_ref


class MhcSeam(NamedTuple):
    """What a sublayer starts from."""

    x: Tensor  # [t, n, c], the streams that it is written back to
    u: Tensor  # [t, c], collapsed and normalised
    post: Tensor  # [t, n] fp32
    comb: Tensor  # [t, n, n] fp32


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


def mhc_enter(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, *,
    iters: int, eps: float, norm_eps: float, backend: str = "auto",
) -> MhcSeam:  # fmt: skip
    """The seam before a sublayer that follows no other: `mhc_seam` with x' = x.

    pre, post, comb = `mhc_coefficients`(x, phi, scale, bias); u = `mhc_collapse_norm`(x, pre,
    weight). norm_eps is that of both root mean squares. The first result is x itself: what reads it
    instead of x hands its gradient to this operator. Neither may be changed in place. Shapes and
    the rest as there.
    """
    check_sizes(x, phi, scale, bias, iters)
    name = ENTER.resolve(usable(backend, x), x.device)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    if not calls_ref_directly(name):
        check_coefficients(x, phi, scale, bias)
        check_norm(x, weight)
    if name == "ref":
        return MhcSeam(x, *mhc_enter_ref(x, phi, scale, bias, weight, **options)[:3])
    return MhcSeam(*Enter.apply(x, phi, scale, bias, weight, *options.values(), name))


def mhc_seam(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, *, iters: int, eps: float, norm_eps: float, backend: str = "auto",
) -> MhcSeam:  # fmt: skip
    """The seam of two sublayers, the first of which returned y.

    x' = `mhc_write_back`(x, y, post, comb); pre', post', comb' = `mhc_coefficients`(x', phi, scale,
    bias); u' = `mhc_collapse_norm`(x', pre', weight). norm_eps is that of both root mean squares.

    Shapes and the rest as there; post and comb are the first sublayer's, phi, scale, bias and
    weight the second's. The coefficients are of x' as it is stored, rounded to the dtype of x. The
    result has the bits of the three calls; gradients differ from theirs in rounding.
    """
    check_sizes(x, phi, scale, bias, iters)
    name = SEAM.resolve(usable(backend, x), x.device)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    if not calls_ref_directly(name):
        check_write_back(x, y, post, comb)
        check_coefficients(x, phi, scale, bias)
        check_norm(x, weight)
    if name == "ref":
        return MhcSeam(*mhc_seam_ref(x, y, post, comb, phi, scale, bias, weight, **options)[:4])
    run = torch.ops.model1.mhc_seam
    return MhcSeam(*run(x, y, post, comb, phi, scale, bias, weight, *options.values(), name)[:4])

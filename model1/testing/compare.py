"""The one tolerance rule of every kernel: per row, at most twice the error of bf16 PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5  # absolute, for rows whose reference is (nearly) zero


def row_errors(got: Tensor, expected: Tensor) -> Tensor:
    """Euclidean distance of each row (last axis) from `expected`, in fp64."""
    return (got.double() - expected.double()).norm(dim=-1)


def delta_noise(out: Tensor, dout: Tensor, p: Tensor, dp: Tensor) -> Tensor:
    """The error of delta = sum(out dout) [..., h] when out and p are rounded to dout's dtype.

    About 2.4 standard deviations: u sqrt(sum (out dout)^2 + sum (p dp)^2), u the largest relative
    error of a rounding. A gradient takes in this one number, which a baseline may have right by
    luck, where its other terms cancel.
    """
    u = torch.finfo(dout.dtype).eps / 2
    rounded_out = (out.double() * dout.double()).square().sum(-1)
    return u * (rounded_out + (p.double() * dp.double()).square().sum(-1)).sqrt()


def assert_close_rows(
    got: Tensor, baseline: Tensor, expected: Tensor, *, factor: float = 2.0, eps: float = EPS,
    noise: Tensor | float = 0.0,
) -> None:  # fmt: skip
    """Fail unless |got - expected| <= factor base + eps |expected| + eps, per row.

    base = sqrt(|baseline - expected|^2 + noise^2); noise: per row, of `delta_noise`, 0 if out of
    nothing but the baseline.

    expected: the fp32 (or fp64) reference. baseline: the same formula computed by plain PyTorch in
    the kernel's own precision (bf16 inputs and products). NaN and infinities must be where
    `expected` has them. Raises AssertionError that names the worst row.
    """
    assert got.shape == expected.shape, f"shape {list(got.shape)} is not {list(expected.shape)}"
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = what(got) != what(expected)
        assert not differs.any(), f"{what.__name__} differs at {differs.nonzero()[0].tolist()}"
    finite = torch.isfinite(expected)
    got, baseline, expected = (
        torch.where(finite, x.float(), 0.0) for x in (got, baseline, expected)
    )
    error, allowed = row_errors(got, expected), row_errors(baseline, expected)
    allowed = (allowed.square() + torch.as_tensor(noise).square()).sqrt()
    allowed = factor * allowed + eps * expected.double().norm(dim=-1) + eps
    if (error > allowed).any():
        worst = int((error - allowed).argmax())
        raise AssertionError(
            f"row {worst} of {list(error.shape)}: error {error.flatten()[worst]:.3e} is above "
            f"{allowed.flatten()[worst]:.3e}"
        )

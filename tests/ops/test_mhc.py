"""Hyper-connection coefficients, Sinkhorn and stream mixing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision
from torch import Tensor

from model1.ops.mhc import (
    mhc_coefficients,
    mhc_collapse,
    mhc_head,
    mhc_write_back,
    sinkhorn,
)

EPS = 1e-6


def naive_sinkhorn(logits: list[list[float]], iters: int, eps: float) -> list[list[float]]:
    n = len(logits)
    comb = []
    for row in logits:
        total = sum(math.exp(x) for x in row)
        comb.append([math.exp(x) / total + eps for x in row])
    for step in range(iters):
        if step > 0:
            comb = [[x / (sum(row) + eps) for x in row] for row in comb]
        sums = [sum(comb[i][j] for i in range(n)) + eps for j in range(n)]
        comb = [[comb[i][j] / sums[j] for j in range(n)] for i in range(n)]
    return comb


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@given(
    n=st.integers(1, 5),
    iters=st.integers(1, 20),
    std=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_sinkhorn_equals_a_float64_loop(n: int, iters: int, std: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(2, n, n) * std
    got = sinkhorn(logits, iters=iters, eps=EPS)
    with torch.no_grad():  # scoring may take a faster way to the same numbers
        scored = sinkhorn(logits, iters=iters, eps=EPS)
    for i in range(2):
        want = torch.tensor(naive_sinkhorn(logits[i].tolist(), iters, EPS), dtype=torch.float64)
        assert_near(got[i], want, 1e-5)
        assert_near(scored[i], want, 1e-5)


# Worst and mean row error of 20,000 random 4 x 4 matrices; columns are normalised last.
@pytest.mark.parametrize(
    ("std", "iters", "worst", "mean"),
    [
        (0.5, 10, 4e-5, 2e-6),
        (0.5, 20, 1e-5, 2e-6),
        (1.0, 10, 3e-2, 4e-5),
        (1.0, 20, 2e-3, 2e-6),
        (1.0, 100, 1e-5, 2e-6),
        (2.0, 20, 6e-2, 6e-4),
        (2.0, 100, 6e-3, 6e-6),
        (4.0, 20, 1.5e-1, 1e-2),
        (8.0, 20, 1.5e-1, 2e-2),
    ],
)
def test_sinkhorn_is_doubly_stochastic_within_the_known_error(
    std: float, iters: int, worst: float, mean: float
) -> None:
    logits = torch.randn(20_000, 4, 4) * std
    with torch.no_grad():
        scored = sinkhorn(logits, iters=iters, eps=EPS)
    for comb in (sinkhorn(logits, iters=iters, eps=EPS), scored):
        assert comb.min() >= 0
        assert (comb.sum(-2) - 1).abs().max() <= 1e-5
        row_error = (comb.sum(-1) - 1).abs()
        assert row_error.max() <= worst
        assert row_error.mean() <= mean


@pytest.mark.parametrize(
    ("tau", "diagonal", "second"), [(2, 0.711, 0.615), (4, 0.948, 0.931), (6, 0.993, 0.990)]
)
def test_start_of_the_residual_mixing(tau: float, diagonal: float, second: float) -> None:
    """Measured diagonal and second eigenvalue of the mixing that starts at tau * I."""
    comb = sinkhorn(tau * torch.eye(4)[None], iters=20, eps=EPS)[0]
    assert comb[2, 2].item() == pytest.approx(diagonal, abs=1e-3)
    assert torch.linalg.eigvalsh(comb)[-2].item() == pytest.approx(second, abs=1e-3)


def test_mixing_neither_amplifies_nor_kills_the_streams() -> None:
    """Spectral norm 1, also of a product of many layers."""
    comb = sinkhorn(torch.randn(100, 4, 4) * 0.5, iters=20, eps=EPS)
    assert (torch.linalg.matrix_norm(comb, ord=2) - 1).abs().max() < 1e-5
    product = torch.linalg.multi_dot(list(comb.double()[:50]))
    assert_near(product.sum(-1), torch.ones(4), 1e-3)
    assert_near(product.sum(-2), torch.ones(4), 1e-3)


@pytest.mark.parametrize("n", [2, 4, 8])
@torch.no_grad()
def test_a_tokens_mixing_does_not_depend_on_the_others(n: int) -> None:
    logits = 3 * torch.randn(65, n, n)
    want = sinkhorn(logits, iters=5, eps=1e-6)
    for rows in ([0], [64, 3], list(range(7, 40))):
        assert torch.equal(sinkhorn(logits[rows], iters=5, eps=1e-6), want[rows])


def test_sinkhorn_gradient_against_finite_differences() -> None:
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    with double_precision():
        assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iters=6, eps=EPS), (logits,))


def coefficient_inputs(
    t: int, n: int, c: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = n * n + 2 * n
    parts = torch.randn(t, n, c), torch.randn(width, n * c), torch.rand(width), torch.randn(width)
    x, phi, scale, bias = (part.to(dtype) for part in parts)
    return x, phi, scale, bias


@given(t=st.integers(0, 3), n=st.integers(1, 4), c=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_coefficients_equal_a_float64_loop(t: int, n: int, c: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, phi, scale, bias = coefficient_inputs(t, n, c)
    got = mhc_coefficients(x, phi, scale, bias, iters=4, eps=EPS, norm_eps=1e-6)
    for i in range(t):
        flat = x[i].double().flatten()
        rms = math.sqrt(flat.square().mean().item() + 1e-6)
        z = [
            scale[k].item() * (phi[k].double() @ flat).item() / rms + bias[k].item()
            for k in range(n * n + 2 * n)
        ]
        pre = [sigmoid(v) + EPS for v in z[:n]]
        post = [2 * sigmoid(v) for v in z[n : 2 * n]]
        rows = [z[2 * n + j * n : 2 * n + (j + 1) * n] for j in range(n)]
        comb = naive_sinkhorn(rows, 4, EPS)
        for part, want in zip(got, (pre, post, comb), strict=True):
            assert part.dtype == torch.float32
            assert_near(part[i], torch.tensor(want, dtype=torch.float64), 3e-5)


def test_coefficient_gradient_against_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in coefficient_inputs(2, 2, 3, torch.float64)]
    with double_precision():
        assert torch.autograd.gradcheck(
            lambda *x: tuple(mhc_coefficients(*x, iters=3, eps=EPS, norm_eps=1e-6)), leaves
        )


def test_coefficients_ignore_the_scale_of_the_streams() -> None:
    x, phi, scale, bias = coefficient_inputs(5, 4, 16)
    options = {"iters": 20, "eps": EPS, "norm_eps": 1e-20}
    want = mhc_coefficients(x, phi, scale, bias, **options)
    got = mhc_coefficients(x * 1024.0, phi, scale, bias, **options)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-6)


def test_each_group_of_columns_reaches_its_own_coefficients() -> None:
    x, phi, _, bias = coefficient_inputs(1, 4, 8)
    base = mhc_coefficients(x, phi, torch.zeros(24), bias, iters=20, eps=EPS, norm_eps=1e-6)
    columns = {"pre": (0, 4), "post": (4, 8), "comb": (8, 24)}
    for name, (start, end) in columns.items():
        scale = torch.zeros(24)
        scale[start:end] = 1.0
        got = mhc_coefficients(x, phi, scale, bias, iters=20, eps=EPS, norm_eps=1e-6)
        changed = {k for k in columns if not torch.equal(getattr(got, k), getattr(base, k))}
        assert changed == {name}


def test_write_back_by_hand_with_a_mixing_that_is_not_symmetric() -> None:
    """comb[j, k] carries stream j into stream k, not the other way round."""
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    y = torch.tensor([[100.0, 1000.0]])
    post = torch.tensor([[0.5, 2.0]])
    comb = torch.tensor([[[0.0, 3.0], [7.0, 0.25]]])
    want = torch.tensor([[[50 + 7 * 2.0, 500 + 7 * 20.0], [200 + 3 + 0.5, 2000 + 30 + 5.0]]])
    assert torch.equal(mhc_write_back(x, y, post, comb), want)


def test_collapse_by_hand() -> None:
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    assert torch.equal(mhc_collapse(x, torch.tensor([[3.0, 0.5]])), torch.tensor([[4.0, 40.0]]))


def test_collapse_and_write_back_gradients() -> None:
    shapes = [(2, 3, 4), (2, 4), (2, 3), (2, 3, 3)]
    x, y, post, comb = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(mhc_write_back, (x, y, post, comb))
    assert torch.autograd.gradcheck(mhc_collapse, (x, post))


def test_the_head_has_the_pre_formula() -> None:
    x, phi, _, bias = coefficient_inputs(3, 4, 8)
    alpha = torch.tensor([0.3])
    got = mhc_head(x, phi[:4], alpha, bias[:4], eps=EPS, norm_eps=1e-6)
    want = mhc_coefficients(x, phi, alpha.expand(24), bias, iters=1, eps=EPS, norm_eps=1e-6).pre
    assert_near(got, want, 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_tokens_do_not_influence_one_another(training: bool) -> None:
    x, phi, scale, bias = coefficient_inputs(17, 4, 32)
    y, order = torch.randn(17, 32), torch.randperm(17)

    def sublayer(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        weights = mhc_coefficients(x, phi, scale, bias, iters=20, eps=EPS, norm_eps=1e-6)
        after = mhc_write_back(x, y, weights.post, weights.comb)
        return (*weights, mhc_collapse(x, weights.pre), after)

    with torch.set_grad_enabled(training):
        want, got = sublayer(x, y), sublayer(x[order], y[order])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b[order])


def test_wrong_arguments_are_named() -> None:
    x, phi, scale, bias = coefficient_inputs(1, 2, 3)
    options = {"iters": 2, "eps": EPS, "norm_eps": 1e-6}
    with pytest.raises(ValueError, match=r"phi must be \[8, 6\], got \[8, 5\]"):
        mhc_coefficients(x, phi[:, :5], scale, bias, **options)
    with pytest.raises(ValueError, match=r"scale and bias must be \[8\]"):
        mhc_coefficients(x, phi, scale[:3], bias, **options)
    with pytest.raises(ValueError, match=r"phi must be \[2, 6\]"):
        mhc_head(x, phi, torch.ones(1), bias[:2], eps=EPS, norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"logits must be \[t, n, n\], got \[2, 3\]"):
        sinkhorn(torch.zeros(2, 3), iters=1, eps=EPS)
    with pytest.raises(ValueError, match="iters must be at least 1, got 0"):
        sinkhorn(torch.zeros(1, 3, 3), iters=0, eps=EPS)

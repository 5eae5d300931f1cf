"""Rotary embedding against complex numbers, its inverse, and YaRN frequencies."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision

from model1.ops.rope import (
    Rotation,
    apply_rope,
    rope_frequencies,
    rotate_tail,
    rotation,
    yarn_frequencies,
)


@given(
    t=st.integers(0, 4),
    pairs=st.integers(1, 6),
    start=st.integers(0, 2**20),
    theta=st.sampled_from([100.0, 1e4, 1.6e5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_pairs_turn_as_complex_numbers(
    t: int, pairs: int, start: int, theta: float, seed: int
) -> None:
    """Channels (2i, 2i + 1) are multiplied by e^(i position theta^(-2i / dim))."""
    torch.manual_seed(seed)
    dim, positions = 2 * pairs, torch.arange(start, start + t)
    x = torch.randn(t, dim)
    got = apply_rope(x, rotation(positions, rope_frequencies(dim, theta)))
    for row in range(t):
        for i in range(pairs):
            turn = cmath.exp(1j * (start + row) * theta ** (-2 * i / dim))
            want = complex(*x[row, 2 * i : 2 * i + 2].tolist()) * turn
            # Angles near 2^20 keep their fraction only because they are made in fp64.
            assert complex(*got[row, 2 * i : 2 * i + 2].tolist()) == pytest.approx(want, abs=2e-6)


def angles(positions: torch.Tensor, dim: int = 8) -> Rotation:
    return rotation(positions, rope_frequencies(dim, 1e4))


def test_every_head_turns_by_its_tokens_angle() -> None:
    x, where = torch.randn(5, 3, 8), angles(torch.tensor([0, 3, 100, 7, 65_000]))
    got = apply_rope(x, where)
    for head in range(3):
        assert torch.equal(got[:, head], apply_rope(x[:, head], where))
    assert torch.equal(got[0], x[0])


def test_inverse_turns_back() -> None:
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    with double_precision():
        where = angles(torch.randint(0, 10**6, (6,)))
        assert where.cos.dtype == torch.float64
        assert_near(apply_rope(apply_rope(x, where), where, inverse=True), x, 1e-14)
        assert_near(apply_rope(apply_rope(x, where, inverse=True), where), x, 1e-14)
        negative = Rotation(where.cos, -where.sin)
        assert_near(apply_rope(x, where, inverse=True), apply_rope(x, negative), 1e-14)


def test_lengths_are_kept_and_products_depend_on_the_offset_alone() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    i, j = torch.arange(40)[:, None].expand(40, 40), torch.arange(40)[None].expand(40, 40)
    with double_precision():
        q_turned = apply_rope(q.expand(1600, 8), angles(i.flatten()))
        k_turned = apply_rope(k.expand(1600, 8), angles(j.flatten()))
    assert_near(q_turned.norm(dim=-1), q.norm().expand(1600), 1e-13)
    products = (q_turned * k_turned).sum(-1).view(40, 40)
    assert_near(products[1:, 1:], products[:-1, :-1], 1e-12)
    assert (products[0, 1:] - products[0, 0]).abs().min() > 1e-6


def test_result_has_the_dtype_of_x_and_is_rounded_once() -> None:
    x, where = torch.randn(4, 8).bfloat16(), angles(torch.arange(4) * 1000)
    got = apply_rope(x, where)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), where).bfloat16())


def test_gradient_is_the_inverse_rotation() -> None:
    x, upstream = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 2, 8)
    where = angles(torch.tensor([0, 1, 50, 999]))
    apply_rope(x, where).backward(upstream)
    assert x.grad is not None
    assert_near(x.grad, apply_rope(upstream, where, inverse=True), 1e-6)


def test_frequencies_fall_from_one_geometrically() -> None:
    got = rope_frequencies(64, 1e4)
    assert got.dtype == torch.float64
    assert got[0] == 1.0
    assert_near(got[1:] / got[:-1], torch.full((31,), 1e4 ** (-2 / 64)), 1e-6)


def test_yarn_with_factor_one_changes_nothing() -> None:
    base = rope_frequencies(64, 1e4)
    got = yarn_frequencies(base, factor=1.0, original_length=4096, beta_fast=32, beta_slow=1)
    assert_near(got, base, 1e-16)


@given(
    factor=st.floats(1.0, 64.0),
    length=st.integers(16, 2**17),
    theta=st.sampled_from([500.0, 1e4, 1.6e5]),
    fast=st.floats(2.0, 64.0),
)
@settings(max_examples=60, deadline=None)
def test_yarn_is_the_published_ramp(factor: float, length: int, theta: float, fast: float) -> None:
    base = rope_frequencies(32, theta)
    got = yarn_frequencies(
        base, factor=factor, original_length=length, beta_fast=fast, beta_slow=1.0
    )
    for f, g in zip(base.tolist(), got.tolist(), strict=True):
        turns = length / (2 * math.pi / f)  # context over wavelength
        ramp = 0.0 if turns < 1.0 else 1.0 if turns > fast else (turns - 1.0) / (fast - 1.0)
        assert g == pytest.approx((1 - ramp) * f / factor + ramp * f, rel=1e-9)


def test_yarn_interpolates_slow_pairs_keeps_fast_ones_and_stays_ordered() -> None:
    base = rope_frequencies(64, 1e4)
    options = {"original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    got = yarn_frequencies(base, factor=8.0, **options)
    turns = 4096 * base / (2 * math.pi)
    assert torch.equal(got[turns >= 32], base[turns >= 32])
    assert_near(got[turns <= 1] * 8, base[turns <= 1], 1e-16)
    assert (turns >= 32).any()
    assert (turns <= 1).any()
    between = (turns > 1) & (turns < 32)
    assert (got[between] < base[between]).all()
    assert (got[between] > base[between] / 8).all()
    assert (got.diff() < 0).all()
    further = yarn_frequencies(base, factor=16.0, **options)
    assert (further <= got).all()
    assert (further[turns < 32] < got[turns < 32]).all()


def test_yarn_slow_pairs_see_no_new_angle_within_the_extended_context() -> None:
    base = rope_frequencies(64, 1e4)
    got = yarn_frequencies(base, factor=4.0, original_length=4096, beta_fast=32, beta_slow=1)
    slow = 4096 * base / (2 * math.pi) <= 1
    assert (got[slow] * 4 * 4096 <= base[slow] * 4096 * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 14), (5, 3, 14), (0, 14)])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_tail_is_rotated_alike_with_and_without_a_gradient(
    dtype: torch.dtype, shape: tuple[int, ...], inverse: bool
) -> None:
    x = torch.randn(shape).to(dtype)
    angles = rotation(torch.arange(7, 7 + shape[0]), rope_frequencies(6, 100.0))
    with torch.no_grad():
        got = rotate_tail(x.clone(), angles, inverse=inverse)
    assert torch.equal(got[..., :8], x[..., :8])
    assert torch.equal(got[..., 8:], apply_rope(x[..., 8:], angles, inverse=inverse))
    assert torch.equal(got, rotate_tail(x, angles, inverse=inverse))

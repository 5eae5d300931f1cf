"""Attention over gathered rows: a loop in fp64, padding that changes nothing, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision, naive_attention
from torch import Tensor

from model1.ops.dense_attention import dense_attention
from model1.ops.sparse_attention import sparse_attention


@given(
    t=st.integers(0, 4),
    h=st.integers(1, 3),
    k=st.integers(0, 6),
    d=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_equals_a_float64_loop(t: int, h: int, k: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, kv, valid = torch.randn(t, h, d), torch.randn(t, k, d), torch.rand(t, k) < 0.7
    value_dim = int(torch.randint(1, d + 1, ()))
    got = sparse_attention(q, kv, valid=valid, value_dim=value_dim, softmax_scale=0.4)
    want = naive_attention(q, kv, valid, value_dim=value_dim, scale=0.4, sink=None)
    assert_near(got[0], want[0], 2e-5)
    assert_near(got[1], want[1], 2e-5)
    assert got[1].dtype == torch.float32


def test_in_double_precision_it_is_the_formula() -> None:
    q, kv = torch.randn(6, 2, 8).double(), torch.randn(6, 9, 8).double()
    valid = torch.rand(6, 9) < 0.5
    with double_precision():
        got = sparse_attention(q, kv, valid=valid, value_dim=5, softmax_scale=0.5)
    want = naive_attention(q, kv, valid, value_dim=5, scale=0.5, sink=None)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-12)


def test_rows_that_are_not_valid_change_no_bit() -> None:
    q, kv = torch.randn(5, 2, 8), torch.randn(5, 12, 8)
    valid = torch.rand(5, 12) < 0.5
    valid[3] = False
    options = {"valid": valid, "value_dim": 8, "softmax_scale": 1.0}
    want = sparse_attention(q, kv.masked_fill(~valid[..., None], 0.0), **options)
    got = sparse_attention(q, kv.masked_fill(~valid[..., None], 1e30), **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0][3], torch.zeros(2, 8))
    assert torch.equal(got[1][3], torch.full((2,), -math.inf))


def test_gathering_every_row_gives_dense_attention() -> None:
    q, kv = torch.randn(7, 3, 8), torch.randn(20, 8)
    ends = torch.randint(0, 21, (7,))
    dense = dense_attention(q, kv, torch.zeros_like(ends), ends, value_dim=6, softmax_scale=0.5)
    shuffled = torch.randperm(20)
    got = sparse_attention(
        q, kv[shuffled].expand(7, -1, -1), valid=shuffled < ends[:, None],
        value_dim=6, softmax_scale=0.5,
    )  # fmt: skip
    assert_near(got[0], dense[0], 1e-6)
    assert_near(got[1], dense[1], 1e-6)


def test_other_queries_and_their_order_change_no_bit() -> None:
    q, kv, valid = torch.randn(9, 3, 16), torch.randn(9, 24, 16), torch.rand(9, 24) < 0.5
    options = {"value_dim": 16, "softmax_scale": 0.3}
    want = sparse_attention(q, kv, valid=valid, **options)
    order = torch.randperm(9)
    got = sparse_attention(q[order], kv[order], valid=valid[order], **options)
    assert torch.equal(got[0], want[0][order])
    assert torch.equal(got[1], want[1][order])
    alone = sparse_attention(q[4:5], kv[4:5], valid=valid[4:5], **options)
    assert torch.equal(alone[0], want[0][4:5])


def test_gradient_against_finite_differences() -> None:
    q = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()

    def op(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = sparse_attention(q, kv, valid=valid, value_dim=3, softmax_scale=0.7)
        return out, lse[:2]  # the last row's lse is -inf

    with double_precision():
        assert torch.autograd.gradcheck(op, (q, kv))


def test_gradient_of_an_empty_row_is_zero() -> None:
    q, kv = torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    valid = torch.tensor([[True] * 3, [False] * 3])
    out, _ = sparse_attention(q, kv, valid=valid, value_dim=4, softmax_scale=1.0)
    out.sum().backward()
    assert q.grad is not None
    assert kv.grad is not None
    assert torch.equal(q.grad[1], torch.zeros(2, 4))
    assert torch.equal(kv.grad[1], torch.zeros(3, 4))
    assert (q.grad[0] != 0).all()


@pytest.mark.parametrize(
    ("q", "kv", "valid", "value_dim", "message"),
    [
        ((2, 3, 4), (2, 5, 6), (2, 5), 4, r"got \[2, 3, 4\], \[2, 5, 6\]"),
        ((2, 3, 4), (1, 5, 4), (1, 5), 4, r"got \[2, 3, 4\], \[1, 5, 4\]"),
        ((2, 3, 4), (5, 4), (2, 5), 4, r"got \[2, 3, 4\], \[5, 4\]"),
        ((2, 3, 4), (2, 5, 4), (2, 4), 4, r"valid must be \[2, 5\], got \[2, 4\]"),
        ((2, 3, 4), (2, 5, 4), (2, 5), 5, r"value_dim must be in 1\.\.4, got 5"),
    ],
)
def test_wrong_arguments_are_named(
    q: tuple[int, ...], kv: tuple[int, ...], valid: tuple[int, ...], value_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(
            torch.zeros(q), torch.zeros(kv), valid=torch.ones(valid, dtype=torch.bool),
            value_dim=value_dim, softmax_scale=1.0,
        )  # fmt: skip

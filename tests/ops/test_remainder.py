"""Low-rank remainder and the merge of two partial softmaxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision, naive_attention
from torch import Tensor

from model1.ops.indexer import scan_weights
from model1.ops.remainder import merge, remainder
from model1.ops.sparse_attention import sparse_attention

INF = math.inf


def inputs(
    t: int, h: int, s: int, r: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, z, rotary keys [s, 2], basis [r, 6] and mean."""
    basis = torch.linalg.qr(torch.randn(6, r, dtype=torch.float64))[0].T
    scores, z, rope = torch.randn(t, h, s) * 2, torch.randn(s, r), torch.randn(s, 2)
    parts = (scores, z, rope, basis, torch.randn(6))
    return parts[0].to(dtype), *(x.to(dtype) for x in parts[1:])  # type: ignore[return-value]


def rest_of(
    scores: Tensor, z: Tensor, rope: Tensor, basis: Tensor, mean: Tensor, rest: Tensor, rotary: bool
) -> tuple[Tensor, Tensor]:
    """The remainder of fully visible scores."""
    t, _, s = scores.shape
    weights, row_max = scan_weights(scores, torch.zeros(t).long(), torch.full((t,), s))
    return remainder(weights, row_max, z, rope, basis, mean, in_rest=rest, rotary_value=rotary)


def naive_remainder(
    scores: Tensor, z: Tensor, rope: Tensor, basis: Tensor, mean: Tensor, rest: Tensor, rotary: bool
) -> tuple[Tensor, Tensor]:
    t, h, s = scores.shape
    value = z.double() @ basis.double() + mean.double()
    value = torch.cat([value, rope.double()], dim=-1) if rotary else value
    out = torch.zeros(t, h, value.shape[-1], dtype=torch.float64)
    lse = torch.full((t, h), -INF, dtype=torch.float64)
    for i in range(t):
        for head in range(h):
            e = {j: math.exp(scores[i, head, j].item()) for j in range(s) if rest[i, j]}
            for j, weight in e.items():
                out[i, head] += weight / sum(e.values()) * value[j]
            if e:
                lse[i, head] = math.log(sum(e.values()))
    return out, lse


@given(
    t=st.integers(0, 4),
    h=st.integers(1, 3),
    s=st.integers(1, 7),
    r=st.integers(1, 6),
    rotary=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_remainder_equals_a_float64_loop(
    t: int, h: int, s: int, r: int, rotary: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = inputs(t, h, s, r)
    in_rest = torch.rand(t, s) < 0.6
    got = rest_of(*parts, in_rest, rotary)
    want = naive_remainder(*parts, in_rest, rotary)
    assert_near(got[0], want[0], 1e-5)
    assert_near(got[1], want[1], 1e-5)


def test_at_full_rank_it_is_attention_over_the_rest() -> None:
    scores, _, rope, basis, mean = inputs(3, 2, 8, 6, torch.float64)
    latent, q = torch.randn(8, 6, dtype=torch.float64), torch.randn(3, 2, 8, dtype=torch.float64)
    kv = torch.cat([latent, rope], dim=-1)
    scores = torch.einsum("thd,sd->ths", q, kv) * 0.4
    in_rest = torch.rand(3, 8) < 0.6
    z = (latent - mean) @ basis.T
    with double_precision():
        got = rest_of(scores, z, rope, basis, mean, in_rest, True)
    want = naive_attention(q, kv, in_rest, value_dim=8, scale=0.4, sink=None)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-12)


def test_tokens_outside_the_rest_do_not_count() -> None:
    scores, z, rope, basis, mean = inputs(1, 3, 12, 4)
    in_rest = torch.arange(12)[None] % 3 > 0
    outside = ~in_rest[0]
    want = rest_of(scores, z, rope, basis, mean, in_rest, True)
    far = z.masked_fill(outside[:, None], 1e30), rope.masked_fill(outside[:, None], -1e30)
    got = rest_of(scores, *far, basis, mean, in_rest, True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    # A core that is far more probable costs the rest no precision.
    for shift in (-60.0, 20.0, 60.0):
        got = rest_of(scores + shift * outside, z, rope, basis, mean, in_rest, True)
        assert_near(got[0], want[0], 1e-4)
        assert_near(got[1], want[1], 1e-4)


def test_remainder_gradient_against_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in inputs(3, 2, 4, 3, torch.float64)]
    in_rest = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()

    def op(*x: Tensor) -> tuple[Tensor, Tensor]:
        scores, z, rope, basis, mean = x
        out, lse = rest_of(scores, z, rope, basis, mean, in_rest, True)
        return out, lse[:2]  # the last row's lse is -inf

    with double_precision():
        assert torch.autograd.gradcheck(op, leaves)


@given(
    s=st.integers(1, 8),
    sink=st.sampled_from([None, 0.7, -4.0, INF, -INF]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_merging_two_halves_is_one_softmax(s: int, sink: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    q, kv = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, s, 5, dtype=torch.float64)
    side = torch.randint(0, 3, (3, s))  # 0: first part, 1: second part, 2: in neither
    sinks = None if sink is None else torch.full((2,), sink, dtype=torch.float64)
    options = {"value_dim": 4, "softmax_scale": 0.5}
    with double_precision():
        first = sparse_attention(q, kv, valid=side == 0, **options)
        second = sparse_attention(q, kv, valid=side == 1, **options)
        got = merge(*first, *second, sinks)
        swapped = merge(*second, *first, sinks)
    want = naive_attention(q, kv, side < 2, value_dim=4, scale=0.5, sink=sinks)
    for result in (got, swapped):
        assert_near(result[0], want[0], 1e-12)
        assert_near(result[1], want[1], 1e-12)


def test_merge_of_two_empty_sides_is_empty() -> None:
    zero, empty = torch.zeros(2, 3, 4), torch.full((2, 3), -INF)
    for sink in (None, torch.tensor([0.0, INF, -INF])):
        out, lse = merge(zero, empty, zero, empty, sink)
        assert torch.equal(out, zero)
        assert torch.equal(lse, empty)


def test_merge_with_an_empty_side_returns_the_other() -> None:
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    got = merge(out, lse, torch.zeros(2, 3, 4), torch.full((2, 3), -INF))
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], lse)


def test_merge_gradient_is_finite_when_one_side_is_empty() -> None:
    """Rows whose core covers everything have an empty rest in every training step."""
    scores, z, rope, basis, mean = inputs(2, 2, 4, 3)
    q, kv = torch.randn(2, 2, 8), torch.randn(2, 3, 8)
    sink = torch.randn(2)
    leaves = [x.requires_grad_() for x in (scores, z, rope, basis, mean, q, kv, sink)]
    in_rest = torch.tensor([[True] * 4, [False] * 4])
    core = sparse_attention(
        q, kv, valid=torch.ones(2, 3, dtype=torch.bool), value_dim=8, softmax_scale=1.0
    )
    rest = rest_of(scores, z, rope, basis, mean, in_rest, True)
    merge(*core, *rest, sink)[0].square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)
    assert scores.grad is not None
    assert torch.equal(scores.grad[1], torch.zeros(2, 4))


def test_merge_gradient_against_finite_differences() -> None:
    shapes = [(2, 2, 3), (2, 2), (2, 2, 3), (2, 2), (2,)]
    leaves = [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]
    assert torch.autograd.gradcheck(merge, leaves)


def test_wrong_shapes_are_named() -> None:
    parts = inputs(2, 1, 4, 3)
    with pytest.raises(ValueError, match=r"in_rest must be \[2, 4\], got \[2, 3\]"):
        rest_of(*parts, torch.ones(2, 3, dtype=torch.bool), True)
    out, lse = torch.zeros(2, 1, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 1, 3\], \[2, 1, 2\]"):
        merge(out, lse, out[..., :2], lse)

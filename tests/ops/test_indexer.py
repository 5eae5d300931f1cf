"""Low-rank scan and core selection: a loop in fp64, and what every selected set must satisfy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision
from torch import Tensor

from model1.ops.dense_attention.ref import range_mask
from model1.ops.indexer import lowrank_scores, scan_weights, select_core


def scan_inputs(
    t: int, h: int, s: int, r: int, d_nope: int, d_rope: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, latents [s, d_nope], rotary keys, an orthonormal basis and a mean."""
    basis = torch.linalg.qr(torch.randn(d_nope, r, dtype=torch.float64))[0].T.to(dtype)
    q, latent = torch.randn(t, h, d_nope + d_rope), torch.randn(s, d_nope)
    rope, mean = torch.randn(s, d_rope), torch.randn(d_nope)
    return q.to(dtype), latent.to(dtype), rope.to(dtype), basis, mean.to(dtype)


@given(
    t=st.integers(0, 3),
    h=st.integers(1, 3),
    s=st.integers(0, 5),
    r=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_scores_equal_a_float64_loop(t: int, h: int, s: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, _, rope, basis, mean = scan_inputs(t, h, s, r, 6, 2)
    z = torch.randn(s, r)
    got = lowrank_scores(q, z, rope, basis, mean, softmax_scale=0.3)
    assert got.dtype == torch.float32
    assert got.shape == (t, h, s)
    q64, z64, rope64, basis64, mean64 = (x.double() for x in (q, z, rope, basis, mean))
    for i in range(t):
        for head in range(h):
            nope, rotary = q64[i, head, :6], q64[i, head, 6:]
            for j in range(s):
                want = nope @ mean64 + (basis64 @ nope) @ z64[j] + rotary @ rope64[j]
                assert got[i, head, j].item() == pytest.approx(0.3 * want.item(), abs=1e-5)


def test_scores_are_exact_logits_at_full_rank() -> None:
    q, latent, rope, basis, mean = scan_inputs(4, 3, 9, 8, 8, 4, torch.float64)
    z = (latent - mean) @ basis.T
    with double_precision():
        got = lowrank_scores(q, z, rope, basis, mean, softmax_scale=0.5)
    want = torch.einsum("thd,sd->ths", q, torch.cat([latent, rope], dim=-1)) * 0.5
    assert_near(got, want, 1e-12)


def test_score_error_is_what_the_basis_leaves_out() -> None:
    q, latent, rope, basis, mean = scan_inputs(4, 3, 9, 3, 8, 4, torch.float64)
    centred = latent - mean
    with double_precision():
        got = lowrank_scores(q, centred @ basis.T, rope, basis, mean, softmax_scale=0.5)
    exact = torch.einsum("thd,sd->ths", q, torch.cat([latent, rope], dim=-1)) * 0.5
    left_out = centred - centred @ basis.T @ basis
    assert_near(exact - got, torch.einsum("thd,sd->ths", q[..., :8], left_out) * 0.5, 1e-12)


def test_score_gradient_against_finite_differences() -> None:
    q, latent, rope, basis, mean = scan_inputs(2, 2, 3, 2, 4, 2, torch.float64)
    z = latent @ basis.T
    leaves = [x.detach().requires_grad_() for x in (q, z, rope, basis, mean)]
    with double_precision():
        assert torch.autograd.gradcheck(lambda *x: lowrank_scores(*x, softmax_scale=0.7), leaves)


@given(t=st.integers(0, 4), h=st.integers(1, 3), s=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_scan_weights_are_exponentials_below_the_visible_maximum(
    t: int, h: int, s: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(t, h, s) * 30
    key_start, key_end = torch.randint(0, s + 1, (2, t)).sort(dim=0).values
    visible = range_mask(s, key_start, key_end)
    hostile = scores.masked_fill(~visible[:, None], math.nan)  # hidden scores may be anything
    weights, row_max = scan_weights(hostile, key_start, key_end)
    assert row_max.dtype == torch.float32
    for i in range(t):
        shown = visible[i]
        assert torch.equal(weights[i][:, ~shown], torch.zeros(h, int((~shown).sum())))
        if shown.any():
            largest = scores[i][:, shown].amax(-1)
            assert torch.equal(row_max[i], largest)
            want = torch.exp(scores[i][:, shown].double() - largest.double()[:, None])
            assert_near(weights[i][:, shown], want, 1e-6)


def test_scan_gradient_is_that_of_a_log_sum() -> None:
    """The maximum is a constant to the gradient, and cancels in row_max + ln sum weights."""
    scores = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    key_start, key_end = torch.tensor([0, 1, 2]), torch.tensor([6, 4, 3])

    def log_sum(scores: Tensor) -> Tensor:
        weights, row_max = scan_weights(scores, key_start, key_end)
        return row_max + weights.sum(-1).log()

    assert torch.autograd.gradcheck(log_sum, (scores,))
    hidden = ~range_mask(6, key_start, key_end)[:, None]
    want = torch.logsumexp(scores.masked_fill(hidden, -math.inf), dim=-1)
    assert_near(log_sum(scores), want, 1e-12)


def select(
    scores: Tensor, key_start: Tensor, key_end: Tensor, count: Tensor, *, topk: int, window: int
) -> Tensor:
    weights, _ = scan_weights(scores, key_start, key_end)
    return select_core(weights, key_start, key_end, count, topk=topk, sliding_window=window)


@given(
    t=st.integers(1, 5),
    h=st.integers(1, 3),
    s=st.integers(1, 24),
    window=st.integers(1, 6),
    extra=st.integers(0, 10),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_a_core_is_the_window_and_then_the_most_probable_visible_keys(
    t: int, h: int, s: int, window: int, extra: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(t, h, s) * 3
    key_start, key_end = torch.randint(0, s + 1, (2, t)).sort(dim=0).values
    topk = window + extra
    count = torch.randint(window, topk + 1, (t,))
    hidden = ~range_mask(s, key_start, key_end)
    hostile = scores.masked_fill(hidden[:, None], math.nan)  # hidden scores may be anything
    got = select(hostile, key_start, key_end, count, topk=topk, window=window)
    assert got.shape == (t, min(topk, s))
    for i in range(t):
        start, end = int(key_start[i]), int(key_end[i])
        chosen = [j for j in got[i].tolist() if j != -1]
        assert len(chosen) == len(set(chosen)) == min(int(count[i]), end - start)
        assert all(start <= j < end for j in chosen)
        near = set(range(max(start, end - window), end))
        assert near <= set(chosen)
        weight = scores[i, :, start:end].double().softmax(-1).sum(0)
        far_in = [weight[j - start] for j in chosen if j not in near]
        far_out = [weight[j - start] for j in range(start, end) if j not in chosen]
        assert not far_in or not far_out or min(far_in) >= max(far_out) - 1e-6


def test_heads_vote_with_probability_not_with_logits() -> None:
    # Head 0 has larger logits but cannot tell key 0 from 1; head 1 prefers key 1 by far.
    scores = torch.tensor([[[50.0, 50.1, 0.0], [0.0, 5.0, 0.0]]])
    start, end = torch.tensor([0]), torch.tensor([3])
    core = select(scores, start, end, torch.tensor([2]), topk=2, window=1)
    assert set(core[0].tolist()) == {1, 2}


def test_keys_past_the_end_change_no_choice() -> None:
    scores = torch.randn(3, 2, 30)
    start, end, count = torch.zeros(3).long(), torch.tensor([9, 14, 20]), torch.full((3,), 6)
    options = {"topk": 8, "window": 2}
    want = select(scores, start, end, count, **options)
    later = scores.clone()
    later[0, :, 9:], later[1, :, 14:], later[2, :, 20:] = math.inf, 1e9, -1e9
    assert torch.equal(select(later, start, end, count, **options), want)


def test_permuting_the_queries_permutes_the_choice() -> None:
    scores = torch.randn(11, 3, 40)
    start = torch.randint(0, 5, (11,))
    end, count = start + torch.randint(1, 35, (11,)), torch.randint(4, 9, (11,))
    order = torch.randperm(11)
    options = {"topk": 8, "window": 3}
    want = select(scores, start, end, count, **options)[order]
    got = select(scores[order], start[order], end[order], count[order], **options)
    assert torch.equal(got, want)


def test_nothing_visible_selects_nothing() -> None:
    edge, count = torch.tensor([0, 4]), torch.tensor([3, 3])
    core = select(torch.randn(2, 2, 6), edge, edge, count, topk=3, window=2)
    assert torch.equal(core, torch.full((2, 3), -1))


def test_the_choice_passes_no_gradient() -> None:
    scores = torch.randn(1, 2, 6, requires_grad=True)
    one = torch.tensor([0]), torch.tensor([6]), torch.tensor([3])
    assert not select(scores, *one, topk=3, window=1).requires_grad


def test_wrong_arguments_are_named() -> None:
    q, latent, rope, basis, mean = scan_inputs(2, 2, 3, 2, 4, 2)
    with pytest.raises(ValueError, match=r"basis must be \[4, 4\], got \[2, 4\]"):
        lowrank_scores(q, latent, rope, basis, mean, softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"q must have 4 \+ 2 channels, got 5"):
        lowrank_scores(q[..., :5], latent[:, :2], rope, basis, mean, softmax_scale=1.0)
    scores, row = torch.zeros(2, 1, 4), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="at least sliding_window 3, got 2"):
        select_core(scores, row, row, row, topk=2, sliding_window=3)
    with pytest.raises(ValueError, match=r"core_count must be \[2\], got \[1\]"):
        select_core(scores, row, row, row[:1], topk=3, sliding_window=3)
    with pytest.raises(ValueError, match=r"key_start and key_end must be \[2\]"):
        scan_weights(scores, row, row[:1])

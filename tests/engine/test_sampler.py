from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.engine.request import Request, SamplingParams
from model1.engine.sampler import SampledToken, Sampler, draw, score_thresholds

from .fakes import END, EOS, naive_token, naive_weights

STOPS = frozenset({EOS, END})


def request(params: SamplingParams, generated: tuple[int, ...] = (), name: str = "a") -> Request:
    one = Request(name, [3, 4, 4], params)
    one.token_ids += generated
    return one


def tokens(requests: list[Request], logits: torch.Tensor) -> list[int | None]:
    return [sampled.token_id for sampled in Sampler(STOPS).sample(requests, logits)]


any_params = st.builds(
    SamplingParams,
    max_tokens=st.just(16),
    min_tokens=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
    top_k=st.sampled_from([0, 1, 3, 60, 1000]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.5, 2),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (9, 11)]),
    logit_bias=st.sampled_from([(), ((5, 3.0), (6, -100.0)), ((3, 100.0),)]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(any_params, min_size=1, max_size=5),
    generated=st.lists(st.integers(0, 63), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_batch_equals_the_naive_formulas_row_by_row(
    params: list[SamplingParams], generated: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(params), 64)).astype(np.float32) * 3
    requests = [request(p, tuple(generated[i:]), name=str(i)) for i, p in enumerate(params)]
    expected = [
        naive_token(r, logits[i], {9, 11} & set(r.params.stop_token_ids) | _eos(r))
        for i, r in enumerate(requests)
    ]
    before = torch.from_numpy(logits.copy())
    assert tokens(requests, before) == expected
    assert torch.equal(before, torch.from_numpy(logits)), "the logits were written to"


def _eos(one: Request) -> set[int]:
    return set() if one.params.ignore_eos else set(STOPS)


@settings(max_examples=60, deadline=None)
@given(
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 70),
    min_p=st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_filters_keep_the_naive_set(top_p: float, top_k: int, min_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 64, generator=generator) * 3
    x = x - x.max()
    params = SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p)
    thresholds = score_thresholds(x, [params])
    kept = [True] * 64 if thresholds is None else (x >= thresholds)[0].tolist()
    assert kept == [weight > 0 for weight in naive_weights(x[0], params)]


def test_tokens_tied_with_the_last_one_kept_stay() -> None:
    x = torch.tensor([[0.0, -1.0, -1.0, -1.0, -5.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.6)):
        thresholds = score_thresholds(x, [params])
        assert thresholds is not None
        assert (x >= thresholds).tolist() == [[True] * 4 + [False]]


def test_draws_follow_the_distribution() -> None:
    x = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(1000, 4)
    x = x - x.max()
    drawn = draw(x, None, [(i + 0.5) / 1000 for i in range(1000)])
    assert torch.bincount(drawn, minlength=4).tolist() == [500, 0, 300, 200]
    assert draw(x[:2], None, [0.0, 1 - 2**-48]).tolist() == [0, 3]
    assert draw(x[:2].flip(1), None, [0.0, 1 - 2**-48]).tolist() == [0, 3]
    assert draw(x[:2, 1:], None, [0.0, 1 - 2**-48]).tolist() == [1, 2]  # weight 0 comes first


def test_a_seeded_result_does_not_depend_on_batch_mates() -> None:
    logits = torch.randn(6, 300) * 2
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 200},
        {"top_p": 0.999},
        {"frequency_penalty": 1.0, "top_p": 0.3},
        {"min_p": 0.2, "logprobs": 3},
        {},
    ]
    requests = [
        request(SamplingParams(seed=i, **kind), (5, 6), name=str(i)) for i, kind in enumerate(kinds)
    ]
    together = Sampler(STOPS).sample(requests, logits)
    for _ in range(3):
        order = torch.randperm(6).tolist()
        shuffled = Sampler(STOPS).sample([requests[i] for i in order], logits[order])
        assert shuffled == [together[i] for i in order]
    alone = [Sampler(STOPS).sample([r], logits[i : i + 1])[0] for i, r in enumerate(requests)]
    assert alone == together


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("extra", [{}, {"presence_penalty": 1.0}, {"top_p": 0.5, "logprobs": 1}])
@pytest.mark.parametrize(
    "bad",
    [
        [0.0, float("nan"), 1.0],
        [0.0, float("inf"), 1.0],
        [float("-inf")] * 3,
        [float("nan")] * 3,
        [float("nan"), float("-inf"), float("-inf")],
    ],
)
def test_an_unusable_row_gives_no_token_and_leaves_others_alone(
    temperature: float, extra: dict[str, Any], bad: list[float]
) -> None:
    good = [0.5, 2.0, -1.0]
    params = SamplingParams(temperature=temperature, seed=1, **extra)
    requests = [Request(name, [0], params) for name in "abc"]
    sampled = Sampler(frozenset()).sample(requests, torch.tensor([good, bad, good]))
    assert sampled[1].token_id is None
    assert sampled[1].error is not None
    clean = Sampler(frozenset()).sample(requests, torch.tensor([good, good, good]))
    assert (sampled[0], sampled[2]) == (clean[0], clean[2])


def test_a_row_whose_only_tokens_are_masked_is_unusable() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, EOS] = 1.0
    assert tokens([request(SamplingParams(min_tokens=1))], logits) == [None]
    assert tokens([request(SamplingParams(min_tokens=0))], logits) == [EOS]


def test_bad_logits_under_the_min_tokens_mask_are_still_found() -> None:
    logits = torch.zeros(1, 8)
    logits[0, EOS] = torch.nan
    assert tokens([request(SamplingParams(min_tokens=1, temperature=0.0))], logits) == [None]


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = torch.randn(2, 32)
    loud = SamplingParams(
        temperature=0.0, logprobs=3, logit_bias=((7, 100.0),), repetition_penalty=1.5
    )
    sampled = Sampler(STOPS).sample(
        [request(loud), request(replace(loud, logprobs=0), name="b")], logits
    )
    expected = torch.log_softmax(logits, -1)
    first, second = (s.logprob for s in sampled)
    assert first is not None
    assert second is not None
    assert (first.token_id, second.token_id) == (7, 7)
    assert first.logprob == pytest.approx(expected[0, 7].item(), abs=1e-6)
    best = expected[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert second.top == ()


def test_penalty_counts_follow_the_request_as_it_grows() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=0.6, repetition_penalty=1.3)
    one, sampler = request(params), Sampler(frozenset())
    logits = torch.randn(1, 16).abs()
    for _ in range(20):
        expected = naive_token(one, logits[0].numpy(), ())
        assert sampler.sample([one], logits) == [SampledToken(expected)]
        one.token_ids.append(expected)
    sampler.forget("a")
    sampler.forget("a")
    expected = naive_token(one, logits[0].numpy(), ())
    assert sampler.sample([one], logits) == [SampledToken(expected)]


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(1, 64) * 30
    for temperature in (0.0, 1e-9, 1e-5, 1e-4):
        params = SamplingParams(temperature=temperature, seed=0)
        assert tokens([request(params)], logits) == [int(logits.argmax())]

"""Whatever the batch, the chunks and the preemptions: every request gets its solo result."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.engine.request import SamplingParams

from .fakes import VOCAB_SIZE, FakeModel, make_engine, naive_generate, run_all

prompts = st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=30)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 16))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 5])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        seed=draw(st.integers(-5, 5)),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        logit_bias=draw(st.sampled_from([(), ((5, 2.5), (7, -100.0))])),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 2])),
    )


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, params(), st.integers(0, 6)), min_size=1, max_size=6),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 40),
    num_blocks=st.integers(14, 40),
)
def test_every_mix_gives_each_request_its_solo_result(
    requests: list[tuple[list[int], SamplingParams, int]],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_blocks: int,
) -> None:
    model = FakeModel()
    engine = make_engine(
        model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
    )
    outputs = []
    for i, (prompt, one, num_steps) in enumerate(requests):
        engine.add_request(str(i), prompt, one)
        for _ in range(num_steps):  # requests arrive while others run
            outputs += engine.step()
    results = run_all(engine, outputs=outputs)
    assert len(results) == len(requests)
    for i, (prompt, one, _) in enumerate(requests):
        expected = naive_generate(prompt, one)
        assert (results[str(i)].token_ids, results[str(i)].finish_reason) == expected
    assert model.max_tokens_seen <= max_num_batched_tokens


@pytest.mark.parametrize("max_num_batched_tokens", [1, 3, 4, 5, 64])
def test_chunked_prefill_changes_nothing(max_num_batched_tokens: int) -> None:
    prompt = [3 + i * 7 % 40 for i in range(61)]
    one = SamplingParams(max_tokens=20, temperature=0.9, seed=1)
    model = FakeModel()
    engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens)
    engine.add_request("a", prompt, one)
    result = run_all(engine)["a"]
    assert (result.token_ids, result.finish_reason) == naive_generate(prompt, one)
    num_chunks = -(-61 // max_num_batched_tokens)
    assert model.num_forwards == num_chunks + len(result.token_ids) - 1


def test_prefill_and_decode_share_a_step() -> None:
    model = FakeModel()
    engine = make_engine(model, max_num_seqs=4, max_num_batched_tokens=8)
    one = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add_request("old", [5, 6, 7], one)
    engine.step()
    engine.add_request("new", list(range(3, 33)), one)
    for _ in range(4):  # 30 prompt tokens beside one decode token per step: 7 + 7 + 7 + 7 + 2
        outputs = engine.step()
        assert [o.request_id for o in outputs] == ["old"]
    assert [o.request_id for o in engine.step()] == ["old", "new"]


def test_pool_pressure_preempts_and_every_request_still_gets_its_solo_result() -> None:
    # 8 blocks of 4 tokens; each request grows to 29 tokens, which is all 8 blocks for itself.
    requests = {
        str(i): ([3 + i, 9, 30 - i, 4, 8], SamplingParams(max_tokens=24, seed=i, ignore_eos=True))
        for i in range(6)
    }
    engine = make_engine(num_blocks=8, max_num_seqs=6)
    for request_id, (prompt, one) in requests.items():
        engine.add_request(request_id, prompt, one)
    results = run_all(engine, max_steps=6 * 24 + 6)
    for request_id, (prompt, one) in requests.items():
        got = results[request_id]
        assert (got.token_ids, got.finish_reason) == naive_generate(prompt, one)
    assert engine.stats().num_preemptions > 0


def test_the_oldest_request_progresses_in_every_step() -> None:
    engine = make_engine(num_blocks=8, max_num_seqs=6)
    for i in range(6):
        one = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)
        engine.add_request(str(i), [3 + i] * 5, one)
    finished: list[str] = []
    while engine.has_work():
        oldest = next(str(i) for i in range(6) if str(i) not in finished)
        outputs = engine.step()
        assert oldest in [o.request_id for o in outputs]
        finished += [o.request_id for o in outputs if o.finished]
    assert finished == sorted(finished)

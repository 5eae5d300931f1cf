from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model1.engine.engine import Engine
from model1.engine.request import Request, SamplingParams
from model1.engine.sampler import SampledToken
from model1.errors import DeviceError, RequestError

from .fakes import (
    EOS,
    VOCAB_SIZE,
    FakeDecoder,
    FakeModel,
    FakeTokenizer,
    History,
    collect,
    make_engine,
    naive_generate,
    run_all,
)

LONG = SamplingParams(max_tokens=24, temperature=0.8, seed=4, ignore_eos=True)


def add_five(engine: Engine, params: SamplingParams = LONG) -> dict[str, list[int]]:
    prompts = {str(i): [10 + i, 3 + i, 7] for i in range(5)}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    return prompts


def check_others(engine: Engine, prompts: dict[str, list[int]], victim: str) -> str | None:
    """Run to the end: the victim ends in error, the others bit-identical to their solo run."""
    results = run_all(engine)
    assert set(results) == set(prompts)
    assert results[victim].finish_reason == "error"
    for request_id, prompt in prompts.items():
        if request_id != victim:
            got = results[request_id]
            assert (got.token_ids, got.finish_reason) == naive_generate(prompt, LONG)
    engine.add_request("after", [5], LONG)
    assert run_all(engine)["after"].token_ids == naive_generate([5], LONG)[0]
    return results[victim].error


@pytest.mark.parametrize(
    "poison",
    [
        lambda x: np.where(np.arange(VOCAB_SIZE) == 9, np.float32("nan"), x),
        lambda x: np.where(np.arange(VOCAB_SIZE) == 9, np.float32("inf"), x),
        lambda x: np.full_like(x, -np.inf),
    ],
)
def test_unusable_logits_end_only_their_request(
    poison: Callable[[np.ndarray], np.ndarray],
) -> None:
    def edit(history: History, logits: np.ndarray) -> np.ndarray:
        return poison(logits) if history[0] == 12 and len(history) == 8 else logits

    engine = make_engine(FakeModel(edit=edit))
    error = check_others(engine, add_five(engine), "2")
    assert error is not None
    assert "logits" in error
    assert engine.stats().num_corrupted_requests == 1


def test_an_error_in_sampling_ends_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    sample = engine._sampler.sample

    def poisoned(requests: list[Request], logits: torch.Tensor) -> list[SampledToken]:
        if any(r.request_id == "3" and r.num_generated_tokens == 5 for r in requests):
            raise FloatingPointError("poison")
        return sample(requests, logits)

    monkeypatch.setattr(engine._sampler, "sample", poisoned)
    error = check_others(engine, add_five(engine), "3")
    assert error == "sampling failed: FloatingPointError: poison"


def test_an_error_in_detokenising_ends_only_its_request() -> None:
    class PoisonedTokenizer(FakeTokenizer):
        num_streams = 0

        def stream(self, *, skip_special_tokens: bool = True) -> FakeDecoder:
            self.num_streams += 1
            return FakeDecoder([] if self.num_streams == 2 else self.pieces)

    engine = make_engine(tokenizer=PoisonedTokenizer())
    error = check_others(engine, add_five(engine), "1")
    assert error == "detokenising failed: IndexError: list index out of range"


def test_a_failing_forward_ends_the_running_requests_and_spares_the_waiting() -> None:
    def edit(history: History, logits: np.ndarray) -> np.ndarray:
        if len(history) == 9 and history[0] == 11:
            raise torch.OutOfMemoryError("out of memory")
        return logits

    engine = make_engine(FakeModel(edit=edit), max_num_seqs=3)
    prompts = add_five(engine)
    results = run_all(engine)
    assert [results[i].finish_reason for i in "01234"] == ["error"] * 3 + ["length"] * 2
    assert results["0"].error == "the model failed: OutOfMemoryError: out of memory"
    assert results["4"].token_ids == naive_generate(prompts["4"], LONG)[0]
    assert engine.stats().num_failed_steps == 1
    engine.add_request("0", prompts["0"], LONG)
    assert run_all(engine)["0"].token_ids == naive_generate(prompts["0"], LONG)[0]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 6, 30])
def test_abort_in_any_state_frees_everything_and_ends_once(num_steps: int) -> None:
    # 40-token prompts through 8-token chunks: 0 steps waiting, 1-4 in prefill, then decoding.
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=2)
    for request_id in ("a", "b", "c"):
        engine.add_request(request_id, [5] * 40, LONG)
    outputs = []
    for _ in range(num_steps):
        outputs += engine.step()
    for request_id in ("a", "b", "c", "a", "unknown"):
        engine.abort(request_id)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.has_work()
    finals = engine.step()
    assert not engine.has_work()
    results = collect([*outputs, *finals])
    assert {r.finish_reason for r in results.values()} == (
        {"abort"} if num_steps < 29 else {"length", "abort"}
    )
    assert engine.step() == []


def test_abort_of_a_preempted_request() -> None:
    engine = make_engine(num_blocks=8, max_num_seqs=4)
    for i in range(4):
        engine.add_request(str(i), [3 + i] * 5, LONG)
    outputs = []
    while not engine.stats().num_preemptions:
        outputs += engine.step()
    victim = engine._scheduler.waiting[0].request_id
    engine.abort(victim)
    results = run_all(engine, outputs=outputs)
    assert {i: r.finish_reason for i, r in results.items()} == {
        str(i): "abort" if str(i) == victim else "length" for i in range(4)
    }


def test_an_id_can_be_used_again_only_after_its_final_output() -> None:
    engine = make_engine()
    params = replace(LONG, repetition_penalty=1.5, frequency_penalty=1.0)
    engine.add_request("a", [5], params)
    first = engine.step()
    engine.abort("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [5], params)
    run_all(engine, outputs=first)
    engine.add_request("a", [30, 31], params)  # nothing of the first one is remembered
    assert run_all(engine)["a"].token_ids == naive_generate([30, 31], params)[0]


def test_every_way_to_end() -> None:
    def edit(history: History, logits: np.ndarray) -> np.ndarray:
        return logits * np.float32("nan") if history[0] == 9 else logits

    engine = make_engine(FakeModel(edit=edit), max_model_len=12)
    forced = {"temperature": 0.0, "max_tokens": 50}
    engine.add_request("eos", [3], SamplingParams(logit_bias=((EOS, 100.0),), **forced))
    engine.add_request(
        "token", [3], SamplingParams(logit_bias=((20, 100.0),), stop_token_ids=(20,), **forced)
    )
    engine.add_request(
        "string", [3], SamplingParams(logit_bias=((10, 100.0),), stop=("aaa",), **forced)
    )
    engine.add_request("length", [3], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.add_request("model_len", [3] * 7, SamplingParams(max_tokens=50, ignore_eos=True))
    engine.add_request("error", [9], LONG)
    engine.add_request("abort", [3], LONG)
    first = engine.step()
    engine.abort("abort")
    results = run_all(engine, outputs=first)
    ended = {name: (r.finish_reason, len(r.token_ids)) for name, r in results.items()}
    assert ended == {
        "eos": ("stop", 1),
        "token": ("stop", 1),
        "string": ("stop", 3),
        "length": ("length", 2),
        "model_len": ("length", 5),
        "error": ("error", 0),
        "abort": ("abort", 1),
    }
    assert results["string"].text == ""
    assert [name for name, r in results.items() if r.error is not None] == ["error"]


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([5] * 32, {}, "prompt"),
        ([5] * 1_000_000, {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([True], {}, "prompt"),
        ([5], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
        ([5], {"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias"),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused_and_leaves_no_trace(
    prompt: list[int], params: dict[str, Any], param: str
) -> None:
    engine = make_engine(max_model_len=32)
    before = engine.stats()
    with pytest.raises(RequestError) as caught:
        engine.add_request("a", prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert engine.stats() == before
    assert not engine.has_work()
    engine.add_request("a", [5] * 31, SamplingParams(max_tokens=50))
    assert run_all(engine)["a"].finish_reason in ("length", "stop")


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(num_blocks=8)  # 32 tokens, the last one generated needs no place
    with pytest.raises(RequestError, match="9 cache blocks") as caught:
        engine.add_request("a", [5] * 10, SamplingParams(max_tokens=24))
    assert caught.value.param == "max_tokens"
    engine.add_request("b", [5] * 10, SamplingParams(max_tokens=23, ignore_eos=True))
    assert len(run_all(engine)["b"].token_ids) == 23


def test_limits_and_devices_agree_with_model_and_memory() -> None:
    whole = make_engine(FakeModel(max_len=100), max_model_len=None, num_blocks=None)
    assert (whole.max_model_len, whole.stats().num_blocks) == (100, 16 * 25)
    small = {"num_blocks": None, "kv_cache_memory_bytes": 8 * 4 * 5}  # five blocks
    shrunk = make_engine(FakeModel(max_len=100), max_model_len=None, **small)
    assert (shrunk.max_model_len, shrunk.stats().num_blocks) == (20, 5)
    with pytest.raises(DeviceError, match=r"max_model_len 50 .* 20 tokens"):
        make_engine(FakeModel(max_len=100), max_model_len=50, **small)
    with pytest.raises(DeviceError, match="'cuda' was asked for"):
        make_engine(device="cuda")


def test_logprobs_come_with_each_token() -> None:
    engine = make_engine()
    engine.add_request("a", [5], SamplingParams(max_tokens=6, logprobs=2, ignore_eos=True))
    engine.add_request("b", [5], SamplingParams(max_tokens=6, ignore_eos=True))
    results = run_all(engine)
    entries = [entry for output in results["a"].outputs for entry in output.logprobs or ()]
    assert [entry.token_id for entry in entries] == list(results["a"].token_ids)
    assert all(len(e.top) == 2 and e.top[0][1] >= e.top[1][1] for e in entries)
    assert all(e.logprob <= e.top[0][1] <= 0 for e in entries)
    assert all(output.logprobs is None for output in results["b"].outputs)


def test_stats_count_what_happened() -> None:
    engine = make_engine()
    add_five(engine, SamplingParams(max_tokens=3, ignore_eos=True))
    assert (engine.stats().num_waiting, engine.stats().num_running) == (5, 0)
    outputs = engine.step()
    assert (engine.stats().num_waiting, engine.stats().num_running) == (0, 5)
    run_all(engine, outputs=outputs)
    stats = engine.stats()
    assert (stats.num_steps, stats.prompt_tokens, stats.generation_tokens) == (3, 15, 15)

"""/v1/completions and the parts both endpoints share, as a client sees them."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion
from serve.fakes import MAX_MODEL_LEN, FakeEngine, Server, events, run_with


def test_a_completion_has_openais_shape_and_counts() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(max_tokens=3)
        assert answer.status_code == 200
        body = Completion.model_validate(answer.json(), strict=True)
        assert body.id.startswith("cmpl-")
        assert (body.object, body.model) == ("text_completion", "fake")
        assert body.choices[0].text == "abc"
        assert body.choices[0].finish_reason == "length"
        assert body.usage is not None
        assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (2, 3)
        assert body.usage.total_tokens == 5

    run_with(test)


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_every_prompt_form_reaches_the_engine(prompt: Any, token_ids: list[list[int]]) -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt=prompt, max_tokens=1)
        assert answer.status_code == 200
        assert [s.prompt for s in server.engine.seen] == token_ids
        assert [c["index"] for c in answer.json()["choices"]] == list(range(len(token_ids)))

    run_with(test)


def test_n_choices_per_prompt_come_in_order_with_distinct_seeds() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt=["a", "b"], n=3, seed=7, max_tokens=1)
        assert len(answer.json()["choices"]) == 6
        assert [s.prompt for s in server.engine.seen] == [[97]] * 3 + [[98]] * 3
        assert [s.params.seed for s in server.engine.seen] == [7, 8, 9, 7, 8, 9]
        assert answer.json()["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 6,
            "total_tokens": 8,
        }

    run_with(test)


def test_echo_puts_the_prompt_first_in_both_modes() -> None:
    async def test(server: Server) -> None:
        whole = await server.complete(echo=True, max_tokens=2)
        assert whole.json()["choices"][0]["text"] == "hiab"
        streamed = await server.complete(prompt=[104, 105], echo=True, max_tokens=2, stream=True)
        texts = [event["choices"][0]["text"] for event in events(streamed.text)]
        assert texts == ["hi", "a", "b"]

    run_with(test)


def test_echo_with_logprobs_is_refused_by_name() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(echo=True, logprobs=1, max_tokens=1)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "logprobs"
        assert "echo" in answer.json()["error"]["message"]

    run_with(test)


def test_logprobs_name_tokens_alternatives_and_offsets() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(logprobs=2, max_tokens=2)
        assert answer.json()["choices"][0]["logprobs"] == {
            "tokens": ["a", "b"],
            "token_logprobs": [-1.0, -1.0],
            "top_logprobs": [{"a": -1.0, "b": -2.0}, {"b": -1.0, "c": -2.0}],
            "text_offset": [0, 1],
        }
        streamed = await server.complete(logprobs=0, max_tokens=2, stream=True)
        offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in events(streamed.text)]
        assert offsets == [[0], [1]]

    run_with(test)


def test_a_stream_ends_with_usage_and_done() -> None:
    async def test(server: Server) -> None:
        options = {"include_usage": True}
        answer = await server.complete(max_tokens=2, n=2, stream=True, stream_options=options)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n")
        *chunks, last = events(answer.text)
        assert all(chunk["usage"] is None for chunk in chunks)
        for index in (0, 1):
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == "ab"
            assert [choice["finish_reason"] for choice in own] == [None, "length"]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        assert len({chunk["id"] for chunk in chunks}) == 1

    run_with(test)


def test_a_stream_without_the_option_carries_no_usage() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(max_tokens=2, stream=True)
        assert all("usage" not in event for event in events(answer.text))

    run_with(test)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "budget"),
    [(2, None, 16), (MAX_MODEL_LEN - 3, None, 3), (MAX_MODEL_LEN - 1, None, 1), (2, 62, 62)],
)
def test_max_tokens_is_clamped_only_when_omitted(
    num_prompt: int, max_tokens: int | None, budget: int
) -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt="x" * num_prompt, max_tokens=max_tokens)
        assert answer.status_code == 200
        assert server.engine.seen[0].params.max_tokens == budget

    run_with(test)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [
        ("x" * 64, None, ("64 tokens", "holds 64")),
        ("x" * 65, 1, ("65 tokens", "holds 64")),
        ("x" * 1_000_064, 1, ("1000064 tokens", "holds 64")),
        ([1] * 64, 1, ("64 tokens", "holds 64")),
        ("xx", 63, ("2 tokens", "max_tokens is 63", "holds 64", "at most 62")),
    ],
)
def test_too_long_is_400_at_once_with_the_numbers(
    prompt: Any, max_tokens: int | None, numbers: tuple[str, ...]
) -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt=prompt, max_tokens=max_tokens)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("max_tokens" if prompt == "xx" else "prompt")
        assert all(number in error["message"] for number in numbers)
        assert not server.engine.seen

    run_with(test)


def test_sampling_fields_reach_the_engine() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(
            max_tokens=5,
            min_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=-1,
            min_p=0.1,
            seed=3,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.2,
            stop="END",
            stop_token_ids=[5],
            logit_bias={"7": -100},
            ignore_eos=True,
            skip_special_tokens=False,
        )
        assert answer.status_code == 200
        params = server.engine.seen[0].params
        assert (params.max_tokens, params.min_tokens, params.top_k) == (5, 2, 0)
        assert (params.temperature, params.top_p, params.min_p) == (0.5, 0.9, 0.1)
        assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
        assert (params.repetition_penalty, params.seed) == (1.2, 3)
        assert (params.stop, params.stop_token_ids) == (("END",), (5,))
        assert params.logit_bias == ((7, -100.0),)
        assert params.ignore_eos
        assert not params.skip_special_tokens

    run_with(test)


def test_ignored_fields_change_nothing() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(
            max_tokens=1, user="u", store=True, metadata={"a": "b"}, service_tier="auto"
        )
        assert answer.status_code == 200

    run_with(test)


def test_a_stop_finish_is_reported() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(max_tokens=9)
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert answer.json()["choices"][0]["text"] == "abc"

    run_with(test, FakeEngine(script="abc"))

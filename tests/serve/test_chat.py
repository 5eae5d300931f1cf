"""/v1/chat/completions as a client sees it."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve.fakes import MAX_MODEL_LEN, SPECIAL, FakeEngine, Server, events, run_with

USER, ASSISTANT, END = (SPECIAL[f"<|{name}|>"] for name in ("user", "assistant", "end"))


def test_an_answer_has_openais_shape() -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(max_tokens=3)
        body = ChatCompletion.model_validate(answer.json(), strict=True)
        assert body.id.startswith("chatcmpl-")
        assert body.choices[0].message.content == "abc"
        assert body.choices[0].message.role == "assistant"
        assert body.usage is not None
        assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (5, 3)

    run_with(test)


def test_messages_go_through_the_template_and_the_turn_end_stops() -> None:
    async def test(server: Server) -> None:
        await server.chat(max_tokens=1)
        sequence = server.engine.seen[0]
        assert sequence.prompt == [USER, 104, 105, END, ASSISTANT]
        assert sequence.params.stop_token_ids == (END,)
        await server.chat(max_tokens=1, ignore_eos=True)
        assert server.engine.seen[1].params.stop_token_ids == ()

    run_with(test)


def test_content_parts_are_joined_and_developer_is_system() -> None:
    async def test(server: Server) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
        answer = await server.chat(messages=messages, max_tokens=1)
        assert answer.status_code == 200
        assert server.engine.seen[0].prompt == [USER, 115, END, USER, 97, 98, END, ASSISTANT]

    run_with(test)


def test_an_answer_can_be_sent_back() -> None:
    async def test(server: Server) -> None:
        first = await server.chat(max_tokens=1)
        message = first.json()["choices"][0]["message"]
        messages = [{"role": "user", "content": "x"}, message, {"role": "user", "content": "y"}]
        answer = await server.chat(messages=messages, max_tokens=1)
        assert answer.status_code == 200

    run_with(test)


def test_a_stream_opens_with_the_role_and_ends_with_usage() -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(
            max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [ChatCompletionChunk.model_validate(e, strict=True) for e in events(answer.text)]
        assert chunks[0].choices[0].delta.role == "assistant"
        deltas = [c.choices[0].delta.content for c in chunks[:-1]]
        assert deltas == ["", "a", "b"]
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2

    run_with(test)


def test_the_answer_may_fill_the_context_when_max_tokens_is_omitted() -> None:
    async def test(server: Server) -> None:
        answer = await server.chat()
        assert server.engine.seen[0].params.max_tokens == MAX_MODEL_LEN - 5
        assert answer.json()["usage"]["total_tokens"] == MAX_MODEL_LEN

    run_with(test)


def test_max_completion_tokens_is_the_newer_name() -> None:
    async def test(server: Server) -> None:
        assert (await server.chat(max_completion_tokens=2)).status_code == 200
        assert (await server.chat(max_completion_tokens=2, max_tokens=2)).status_code == 200
        assert [s.params.max_tokens for s in server.engine.seen] == [2, 2]
        answer = await server.chat(max_completion_tokens=2, max_tokens=3)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")

    run_with(test)


def test_logprobs_have_tokens_bytes_and_alternatives() -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(max_tokens=1, logprobs=True, top_logprobs=2)
        body = ChatCompletion.model_validate(answer.json(), strict=True)
        logprobs = body.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        entry = logprobs.content[0]
        assert (entry.token, entry.bytes, entry.logprob) == ("a", [97], -1.0)
        assert [t.token for t in entry.top_logprobs] == ["a", "b"]

    run_with(test)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "extra": 1}], "messages[0].extra"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ("hi", "messages"),
        ([{"role": "user", "content": "x" * 65}], "messages"),
    ],
)
def test_a_bad_conversation_is_named(messages: Any, param: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(messages=messages)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    run_with(test)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file:///etc/passwd"}},
    ],
)
def test_parts_other_than_text_are_refused_without_any_connection(
    part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the server opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)

    async def test(server: Server) -> None:
        answer = await server.chat(messages=[{"role": "user", "content": [part]}])
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[0].content"
        assert part["type"] in answer.json()["error"]["message"]

    run_with(test)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {}),
        ("chat_template", "{{ 1 }}"),
        ("top_logprobs", 3),
        ("echo", True),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field: str, value: Any) -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(**{field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(field)

    run_with(test)


def test_what_asks_for_nothing_is_accepted() -> None:
    async def test(server: Server) -> None:
        answer = await server.chat(
            max_tokens=1,
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            parallel_tool_calls=True,
            reasoning_effort="low",
            verbosity="low",
            logit_bias=None,
            stop=None,
        )
        assert answer.status_code == 200

    run_with(test, FakeEngine(script="ab"))

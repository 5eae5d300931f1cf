"""Bad requests: always an OpenAI error body that names the parameter, and a server that lives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.fakes import FakeEngine, Server, run_with

from model1.serve.body import parse_json
from model1.serve.config import Limits, ServeConfig
from model1.serve.errors import ApiError

JSON = {"content-type": "application/json"}
HUGE = 10**40


def check_error(body: dict[str, Any], param: str | None) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "fake", "prompt": "\xff"}',
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "x", "temperature": NaN}',
        b'{"model": "fake", "prompt": "x", "temperature": Infinity}',
        b'{"model": "fake", "prompt": "x", "temperature": 1e999}',
        b'{"model": "fake", "prompt": "x", "model": "fake"}',
        b'{"model": "fake", "seed": 1' + b"0" * 6000 + b', "seed": 2}',
        b"[" * 100_000,
        b"[" * 999 + b"]" * 999,
        b'{"a":' * 999 + b"1" + b"}" * 999,
        b"[]",
        b'"prompt"',
        b"null",
        b"\xef\xbb\xbf{}",
        b"{" + b",".join(b'"k%d": 1' % i for i in range(513)) + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_400(body: bytes) -> None:
    async def test(server: Server) -> None:
        answer = await server.client.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        check_error(answer.json(), None)
        assert (await server.complete(max_tokens=1)).status_code == 200

    run_with(test)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 1e30, HUGE, True, "5", 1.5, [], {}]),
        ("n", [0, 9, -1, True, 1.0, HUGE]),
        ("temperature", [-0.1, 2.1, "1", True, HUGE, [1]]),
        ("top_p", [0, 1.1, -1, False]),
        ("top_k", [-2, 1.5, HUGE, True]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [False, -1, 2**63, HUGE, "1", 0.5]),
        ("logprobs", [-1, 21, True, HUGE]),
        ("presence_penalty", [2.5, -2.5]),
        ("frequency_penalty", [2.5, -2.5]),
        ("repetition_penalty", [0, -1, 2.5]),
        ("min_tokens", [-1, 17, HUGE]),
        ("stop", ["", [""], ["a"] * 5, ["a"] * 10_000, "x" * 257, 5, [5], {"a": 1}]),
        ("stop_token_ids", [[-1], [260], [True], [2**40], [1] * 65, "1"]),
        ("logit_bias", [{"a": 1}, {"-1": 1}, {"260": 1}, {"1": 101}, {"1": "2"}, {"1": True}]),
        ("logit_bias", [{"9" * 5000: 1}, {str(i): 1 for i in range(301)}, [1]]),
        ("stream", ["true", 1, 0]),
        ("echo", ["yes", 1]),
        ("ignore_eos", [1]),
        ("user", [5, {"a": 1}]),
        ("metadata", [{"a": 1}, "x"]),
        ("best_of", [2]),
        ("suffix", ["x"]),
        ("prompt_logprobs", [-1]),
        ("stream_options", [{"include_usage": True}, 5]),
    ],
)
def test_a_bad_value_is_400_and_named(field: str, values: list[Any]) -> None:
    async def test(server: Server) -> None:
        for value in values:
            answer = await server.client.post(
                "/v1/completions", json={"model": "fake", "prompt": "hi", field: value}
            )
            assert answer.status_code == 400, value
            body = answer.json()
            assert body["error"]["param"].startswith(field), value
            check_error(body, body["error"]["param"])
            assert field in body["error"]["message"]
            assert len(body["error"]["message"]) < 300

    run_with(test)


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], [1, "a"], [[1], "a"], [True], [-1], [1.0], [260], [[2**40]], None, 5, {}],
)
def test_a_bad_prompt_is_400_and_named(prompt: Any) -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt=prompt)
        assert answer.status_code == 400
        check_error(answer.json(), "prompt")

    run_with(test)


def test_missing_unknown_and_misplaced_fields_are_named() -> None:
    async def test(server: Server) -> None:
        post = server.client.post
        missing = await post("/v1/completions", json={"model": "fake"})
        assert missing.json()["error"]["param"] == "prompt"
        no_model = await post("/v1/completions", json={"prompt": "x"})
        assert no_model.json()["error"]["param"] == "model"
        unknown = await server.complete(**{"temprature": 1})
        assert unknown.json()["error"]["param"] == "temprature"
        hostile = await server.complete(**{"x\n\x1b[31m\u202e": 1})
        assert hostile.status_code == 400
        assert "\n" not in hostile.json()["error"]["param"]
        nested = await server.complete(stream=True, stream_options={"x": 1})
        assert nested.json()["error"]["param"] == "stream_options.x"

    run_with(test)


def test_too_many_prompts_or_sequences_are_400() -> None:
    async def test(server: Server) -> None:
        many = await server.complete(prompt=["x"] * 129)
        assert (many.status_code, many.json()["error"]["param"]) == (400, "prompt")
        product = await server.complete(prompt=["x"] * 20, n=8)
        assert (product.status_code, product.json()["error"]["param"]) == (400, "n")

    run_with(test)


def test_an_unknown_model_path_or_method_has_its_status() -> None:
    async def test(server: Server) -> None:
        model = await server.complete(model="gpt-\n5")
        assert (model.status_code, model.json()["error"]["param"]) == (404, "model")
        assert model.json()["error"]["code"] == "model_not_found"
        chat = await server.chat(model="other")
        assert chat.status_code == 404
        path = await server.client.get("/v1/embeddings")
        assert (path.status_code, set(path.json())) == (404, {"error"})
        method = await server.client.get("/v1/completions")
        assert (method.status_code, set(method.json())) == (405, {"error"})
        preflight = await server.client.options("/v1/completions", headers={"origin": "http://x"})
        assert preflight.status_code == 405
        assert not [h for h in preflight.headers if h.startswith("access-control")]

    run_with(test)


def test_only_json_bodies_are_read() -> None:
    async def test(server: Server) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await server.client.post(
                "/v1/completions", content=b"{}", headers={"content-type": kind}
            )
            assert answer.status_code == 415

    run_with(test)


def test_a_large_body_is_413_declared_or_chunked() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 1024

    async def test(server: Server) -> None:
        for content in (b"x" * 5000, chunks()):
            answer = await server.client.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413
            assert "4096" in answer.json()["error"]["message"]
        lying = await server.client.post(
            "/v1/completions", content=b"{}", headers={**JSON, "content-length": "-5"}
        )
        assert lying.status_code == 413
        assert (await server.complete(max_tokens=1)).status_code == 200

    run_with(test, config=ServeConfig(limits=Limits(max_body_bytes=4096)))


def test_a_prompt_far_too_long_is_400_up_to_the_largest_body() -> None:
    async def test(server: Server) -> None:
        answer = await server.complete(prompt="x" * 1_000_000)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        answer = await server.complete(prompt="x" * (1 << 20))
        assert answer.status_code == 413
        assert "context of 64 tokens" in answer.json()["error"]["message"]

    run_with(test)
    assert Limits().body_bytes(max_model_len=1 << 20) == 16 << 20
    assert Limits(max_body_bytes=10).body_bytes(max_model_len=1 << 20) == 10


def test_an_engine_refusal_keeps_its_parameter() -> None:
    async def test(server: Server) -> None:
        for stream in (False, True):
            answer = await server.complete(stream=stream)
            assert answer.status_code == 400
            check_error(answer.json(), "prompt")
            assert "cache blocks" in answer.json()["error"]["message"]
        assert server.worker.num_active == 0

    run_with(test, FakeEngine(refuse="the request may need 9 cache blocks"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    with contextlib.suppress(ApiError):
        parse_json(body)

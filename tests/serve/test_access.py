"""Who may call what, and what ends up in the log."""

from __future__ import annotations

import logging

import pytest
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.fakes import FakeEngine, Server, run_with

from model1.errors import ConfigError
from model1.serve.config import ServeConfig
from model1.serve.log import OneLineFormatter, escape
from model1.serve.middleware import OPEN_PATHS, key_matches

KEY = "sk-test-123"
LOCKED = ServeConfig(api_key=KEY)


def test_every_route_but_health_asks_for_the_key() -> None:
    async def test(server: Server) -> None:
        paths = {r.path for r in server.app.routes if isinstance(r, APIRoute)}
        assert paths >= {"/v1/completions", "/v1/chat/completions", "/v1/models"} | OPEN_PATHS
        for path in [*paths, "/openapi.json", "/nowhere", "/health/", "//health", "/v1/models/x"]:
            for method in ("GET", "POST", "OPTIONS"):
                answer = await server.client.request(method, path)
                assert (answer.status_code == 401) == (path not in OPEN_PATHS), path
                if answer.status_code == 401:
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"

    run_with(test, config=LOCKED)


def test_the_key_opens_and_a_wrong_one_does_not() -> None:
    async def test(server: Server) -> None:
        for header, status in [
            (f"Bearer {KEY}", 200),
            (f"bearer {KEY}", 200),
            (f"Bearer {KEY}x", 401),
            (f"Basic {KEY}", 401),
            (KEY, 401),
            ("Bearer ", 401),
        ]:
            answer = await server.client.get("/v1/models", headers={"authorization": header})
            assert answer.status_code == status, header

    run_with(test, config=LOCKED)


def test_without_a_key_everything_is_open() -> None:
    async def test(server: Server) -> None:
        models = (await server.client.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["fake"]
        assert (await server.client.get("/v1/models/fake")).json() == models["data"][0]
        missing = await server.client.get("/v1/models/a/b")
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")
        assert (await server.client.get("/openapi.json")).status_code == 200

    run_with(test)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_no_other_header_matches(header: str) -> None:
    assert not key_matches(header, KEY)
    assert key_matches(f"Bearer {KEY}", KEY)


@pytest.mark.parametrize("key", ["", "a\nb", "clé"])
def test_a_key_that_no_header_can_carry_is_refused_at_start(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        ServeConfig(api_key=key)


def test_the_key_is_not_in_the_config_text() -> None:
    assert KEY not in repr(LOCKED)


def test_answers_carry_no_cors_and_forbid_sniffing() -> None:
    async def test(server: Server) -> None:
        answer = await server.client.get("/v1/models", headers={"origin": "http://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'"

    run_with(test)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [OneLineFormatter().format(record) for record in caplog.records]


def test_hostile_fields_give_one_ascii_line_per_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="model1")
    hostile = "x\r\nINFO: 127.0.0.1 - forged\x1b[31m\u202e\x00"

    async def test(server: Server) -> None:
        await server.complete(model=hostile)
        await server.complete(**{hostile: 1})
        await server.chat(messages=[{"role": hostile, "content": "secret prompt"}])
        await server.client.get("/%0d%0a%1b[31mforged")
        await server.complete(prompt="secret prompt", max_tokens=1)

    run_with(test)
    lines = log_lines(caplog)
    assert len(lines) >= 5
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert not any("secret" in line for line in lines)


def test_engine_death_is_logged_once_with_its_traceback_on_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(server: Server) -> None:
        await server.complete()

    run_with(test, FakeEngine(die_at_step=1))
    dead = [line for line in log_lines(caplog) if "the engine died" in line]
    assert len(dead) == 1
    assert "device-side\\nassert" in dead[0]
    assert dead[0].isprintable()


def test_an_unexpected_error_is_a_500_without_details(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("internal detail")

    monkeypatch.setattr("serve.fakes.FakeTokenizer.encode", explode)

    async def test(server: Server) -> None:
        answer = await server.complete()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "detail" not in answer.text
        assert (await server.chat(messages=[{"role": "user", "content": ""}])).status_code == 500

    run_with(test)
    assert any("internal detail" in line for line in log_lines(caplog))


@given(st.text())
def test_escaped_text_is_one_printable_line(text: str) -> None:
    escaped = escape(text)
    assert escaped.isascii()
    assert escaped == "" or escaped.isprintable()

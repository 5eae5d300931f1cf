"""Every request ends: clients that leave, a full queue, a dying or hanging engine, shutdown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from serve.fakes import Connection, FakeEngine, Server, events, eventually, run_with

from model1.serve.config import Limits, ServeConfig

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 60}


def connect(server: Server, **fields: Any) -> Connection:
    connection = Connection(server.app, COMPLETIONS, {**BODY, **fields})
    connection.open()
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_ends_its_sequences(stream: bool, n: int) -> None:
    async def test(server: Server) -> None:
        connection = connect(server, stream=stream, n=n)
        await eventually(lambda: server.engine.num_steps > 3)
        assert server.worker.num_active == n
        connection.hang_up()
        await eventually(lambda: len(server.engine.aborted) == n, within_s=0.5)
        assert server.worker.num_active == 0
        assert not server.engine.sequences
        assert connection.task is not None
        await connection.task

    run_with(test, FakeEngine(step_s=0.01))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_its_first_token_ends_its_sequence(stream: bool) -> None:
    async def test(server: Server) -> None:
        server.engine.gate.clear()
        first = connect(server, stream=stream)
        await eventually(lambda: server.worker.num_active == 1)
        queued = connect(server, stream=stream)
        await eventually(lambda: server.worker.num_active == 2)
        first.hang_up()
        queued.hang_up()
        await eventually(lambda: server.worker.num_active == 0)
        server.engine.gate.set()
        await eventually(lambda: not server.engine.sequences)
        assert (await server.complete(max_tokens=1)).status_code == 200

    run_with(test)


def test_many_disconnects_leave_nothing_behind_and_others_finish() -> None:
    async def test(server: Server) -> None:
        loyal = asyncio.create_task(server.complete(max_tokens=40))
        for i in range(50):
            connection = connect(server, stream=i % 2 == 0)
            await asyncio.sleep(0.002 * (i % 3))
            connection.hang_up()
        answer = await loyal
        assert len(answer.json()["choices"][0]["text"]) == 40
        await eventually(lambda: server.worker.num_active == 0 and not server.engine.sequences)

    run_with(test, FakeEngine(step_s=0.002))


def test_a_full_queue_is_503_with_retry_after_and_recovers() -> None:
    async def test(server: Server) -> None:
        server.engine.gate.clear()
        running = [asyncio.create_task(server.complete(max_tokens=1)) for _ in range(2)]
        await eventually(lambda: server.worker.num_active == 2)
        for stream in (False, True):
            refused = await server.complete(stream=stream)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "queue is full" in refused.json()["error"]["message"]
        server.engine.gate.set()
        assert [(await task).status_code for task in running] == [200, 200]
        assert (await server.complete(max_tokens=1)).status_code == 200

    run_with(test, config=ServeConfig(limits=Limits(max_active_sequences=2)))


def test_engine_death_fails_requests_in_flight_and_readiness() -> None:
    async def test(server: Server) -> None:
        assert (await server.client.get("/health/ready")).status_code == 200
        streams = [connect(server, stream=True) for _ in range(5)]
        whole = asyncio.create_task(server.complete(max_tokens=60))
        await eventually(lambda: server.engine.num_steps >= 20)
        died_at = time.monotonic()
        for connection in streams:
            assert connection.task is not None
            await connection.task
            *_, last = events(connection.body)
            assert last["error"]["type"] == "server_error"
        answer = await whole
        assert time.monotonic() - died_at < 1.0
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
        assert "CUDA" not in answer.text
        for path in ("/health/ready", "/health"):
            assert (await server.client.get(path)).status_code == 503
        assert (await server.client.get("/health/live")).status_code == 200
        assert (await server.complete()).status_code == 503

    run_with(test, FakeEngine(step_s=0.005, die_at_step=20))


def test_a_hung_engine_is_not_ready_and_a_slow_one_is() -> None:
    async def ready(server: Server) -> int:
        return (await server.client.get("/health/ready")).status_code

    async def test(server: Server) -> None:
        slow = asyncio.create_task(server.complete(max_tokens=20))
        for _ in range(8):
            await asyncio.sleep(0.05)
            assert await ready(server) == 200
        server.engine.gate.clear()
        await asyncio.sleep(0.4)
        assert await ready(server) == 503
        server.engine.gate.set()
        assert (await slow).status_code == 200
        assert await ready(server) == 200

    config = ServeConfig(limits=Limits(hang_timeout_s=0.2))
    run_with(test, FakeEngine(step_s=0.03), config)


def test_an_error_of_one_sequence_is_500_or_an_error_event() -> None:
    async def test(server: Server) -> None:
        whole = await server.complete()
        assert (whole.status_code, whole.json()["error"]["message"]) == (500, "row holds NaN")
        stream = await server.complete(stream=True)
        assert stream.status_code == 500
        assert server.worker.is_ready

    run_with(test, FakeEngine(finish_with="error"))


def test_an_engine_abort_is_503() -> None:
    async def test(server: Server) -> None:
        assert (await server.complete()).status_code == 503

    run_with(test, FakeEngine(finish_with="abort"))


def test_draining_refuses_new_requests_and_finishes_old_ones() -> None:
    async def test(server: Server) -> None:
        old = asyncio.create_task(server.complete(max_tokens=20))
        await eventually(lambda: server.engine.num_steps > 2)
        server.worker.drain()
        assert (await server.client.get("/health/ready")).status_code == 503
        refused = await server.complete()
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert (await old).status_code == 200

    run_with(test, FakeEngine(step_s=0.005))


def test_the_end_of_a_drain_gives_every_request_an_error() -> None:
    async def test(server: Server) -> None:
        stream = connect(server, stream=True)
        whole = asyncio.create_task(server.complete(max_tokens=60))
        await eventually(lambda: server.engine.num_steps > 5)
        server.worker.abort_all()
        assert (await whole).status_code == 503
        assert stream.task is not None
        await stream.task
        assert "shutting down" in events(stream.body)[-1]["error"]["message"]
        await eventually(lambda: not server.engine.sequences)

    run_with(test, FakeEngine(step_s=0.01))


def test_a_body_that_never_ends_is_408() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async def test(server: Server) -> None:
        answer = await server.client.post(
            COMPLETIONS, content=endless(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 408

    run_with(test, config=ServeConfig(limits=Limits(body_timeout_s=0.1)))

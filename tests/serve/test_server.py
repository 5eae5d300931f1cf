"""The server process on a real socket: the official client, slow and rude clients, signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from model1.errors import ConfigError
from model1.serve.server import bind

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """A server process whose log is collected."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def wait(self) -> int:
        return self.process.wait(timeout=20)


@contextlib.contextmanager
def server_process(*, step_s: float = 0.0, shutdown_timeout: float = 5.0) -> Iterator[Process]:
    command = [sys.executable, "-m", "serve.fake_server", "0", str(step_s), str(shutdown_timeout)]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            found = re.search(r"ready on (http://[\d.]+:\d+)$", lines[-1])
            if found:
                break
        else:
            raise AssertionError(f"the server ended at start: {lines}")
        pipe = process.stderr
        reader = threading.Thread(target=lambda: lines.extend(x.rstrip("\n") for x in pipe))
        reader.start()
        try:
            yield Process(process, found[1], lines)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join()


@pytest.fixture(scope="module")
def live() -> Iterator[Process]:
    with server_process(step_s=0.002) as process:
        yield process


def request_head(body_length: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(body_length).encode() + b"\r\n\r\n"
    )


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(10)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    return data


def test_the_official_client_completes_chats_streams_and_lists(live: Process) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").id == "fake"
        done = client.completions.create(model="fake", prompt="hi", max_tokens=4, logprobs=2)
        assert done.choices[0].text == "abcd"
        chat = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=3,
            temperature=0,
        )
        assert chat.choices[0].message.content == "abc"
        stream = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "abcde"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5


def test_the_official_client_raises_its_own_errors(live: Process) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="fake", prompt="x" * 100)
        assert (bad.value.param, bad.value.code) == ("prompt", "context_length_exceeded")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")


def test_the_ready_lines_name_a_url_and_a_curl_command(live: Process) -> None:
    assert any(f"ready on {live.url}" in line for line in live.lines)
    deadline = time.monotonic() + 10  # the line after the one that says ready
    while not any("try: curl" in line for line in live.lines) and time.monotonic() < deadline:
        time.sleep(0.05)
    curl = next(line for line in live.lines if "try: curl" in line)
    assert f"curl {live.url}/v1/completions" in curl
    assert '"model":"fake"' in curl


def test_half_open_and_dribbling_connections_are_closed_in_time(live: Process) -> None:
    silent = [socket.create_connection(live.address) for _ in range(50)]
    dribbling = socket.create_connection(live.address)
    start = time.monotonic()
    for byte in b"GET /health":
        dribbling.sendall(bytes([byte]))
        time.sleep(0.02)
    assert httpx.get(live.url + "/health").status_code == 200
    for sock in [*silent, dribbling]:
        with sock:
            assert read_all(sock) == b""
    assert time.monotonic() - start < 4.0


def test_a_kept_alive_connection_that_dribbles_is_closed(live: Process) -> None:
    with socket.create_connection(live.address) as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.sendall(b"GET /hea")
        start = time.monotonic()
        assert read_all(sock).endswith(b'{"status":"live"}')
        assert time.monotonic() - start < 3.0


def test_a_giant_header_is_refused(live: Process) -> None:
    with socket.create_connection(live.address) as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000)
        assert b"200 OK" not in read_all(sock)
    assert httpx.get(live.url + "/health").status_code == 200


def test_health_answers_while_giant_bodies_arrive(live: Process) -> None:
    async def upload(client: httpx.AsyncClient, declared: bool) -> int:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b" " * 1_000_000

        headers = {"content-type": "application/json"}
        if declared:
            headers["content-length"] = "40000000"
        try:
            answer = await client.post("/v1/completions", content=chunks(), headers=headers)
        except (httpx.WriteError, httpx.ReadError):
            return 413  # the refusal was lost with the connection that the server cut
        return answer.status_code

    async def main() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=30) as client:
            uploads = [asyncio.create_task(upload(client, bool(i % 2))) for i in range(2)]
            worst = 0.0
            while not all(task.done() for task in uploads):
                start = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                worst = max(worst, time.monotonic() - start)
            assert [await task for task in uploads] == [413, 413]
            assert worst < 1.0

    asyncio.run(main())


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_socket_closed_by_the_client_is_noticed(live: Process, stream: str) -> None:
    body = b'{"model":"fake","prompt":"hi","max_tokens":62,"stream":%s}' % stream.encode()
    num_before = len(live.lines)
    with socket.create_connection(live.address) as sock:
        sock.sendall(request_head(len(body)) + body)
        time.sleep(0.03)
    deadline = time.monotonic() + 3
    expected = "/v1/completions' 200" if stream == "true" else "/v1/completions' 499"
    while not any(expected in line for line in live.lines[num_before:]):
        assert time.monotonic() < deadline, live.lines[num_before:]
        time.sleep(0.01)


def wait_until_refused(server: Process) -> None:
    deadline = time.monotonic() + 5
    with contextlib.suppress(httpx.TransportError):
        while httpx.get(server.url + "/health/live").status_code:
            assert time.monotonic() < deadline, "the server still accepts connections"
            time.sleep(0.05)


def test_sigterm_lets_running_requests_finish_refuses_new_ones_and_exits_0() -> None:
    with server_process(step_s=0.02) as server:
        started = threading.Barrier(6, timeout=20)
        answers: list[bytes] = []

        def ask() -> None:
            body = {"model": "fake", "prompt": "hi", "max_tokens": 60, "stream": True}
            url = server.url + "/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=20) as answer:
                chunks = answer.iter_bytes()
                first = next(chunks)
                started.wait()
                answers.append(first + b"".join(chunks))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        started.wait()
        server.process.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        for thread in threads:
            thread.join()
        assert [answer.count(b'"text"') for answer in answers] == [60] * 5
        assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
        assert server.wait() == 0


def test_sigterm_ends_long_requests_with_an_error_after_the_timeout() -> None:
    with server_process(step_s=0.2, shutdown_timeout=0.3) as server:
        body = b'{"model":"fake","prompt":"hi","max_tokens":62,"stream":true}'
        with socket.create_connection(server.address) as sock:
            sock.sendall(request_head(len(body)) + body)
            time.sleep(0.5)
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            data = read_all(sock)
        assert b"shutting down" in data
        assert b"[DONE]" not in data
        assert server.wait() == 0
        assert time.monotonic() - start < 4.0


def test_a_port_in_use_is_one_clear_sentence() -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: address already in use"):
            bind("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_one_clear_sentence() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid port 1"):
        bind("no.such.host.invalid", 1)

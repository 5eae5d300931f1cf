"""A scripted engine, a byte tokenizer and an ASGI client that streams and can hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from model1.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from model1.errors import RequestError
from model1.serve.app import create_app
from model1.serve.config import ServeConfig
from model1.serve.plan import ServedModel
from model1.serve.worker import AsyncEngine

MAX_MODEL_LEN = 64
SPECIAL = {"<|endoftext|>": 256, "<|user|>": 257, "<|assistant|>": 258, "<|end|>": 259}


class FakeTokenizer:
    """One token per byte, special tokens above."""

    vocab_size = 260
    special_tokens = SPECIAL
    end_of_turn_token_id = SPECIAL["<|end|>"]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        names = {number: name.encode() for name, number in SPECIAL.items()}
        special = {} if skip_special_tokens else names
        return b"".join(special.get(i, b"") if i > 255 else bytes([i]) for i in ids).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [SPECIAL["<|user|>"], *self.encode(message["content"]), SPECIAL["<|end|>"]]
        return [*ids, SPECIAL["<|assistant|>"]] if add_generation_prompt else ids


@dataclass
class FakeSequence:
    """A request inside the fake engine."""

    prompt: list[int]
    params: SamplingParams
    made: int = 0


@dataclass
class FakeEngine:
    """Answers with the letters a, b, c, ... of `script`, one token per step."""

    script: str = "abcdefghijklmnopqrstuvwxyz" * 8
    step_s: float = 0.0
    die_at_step: int | None = None
    finish_with: FinishReason | None = None  # instead of going on after the first token
    sequences: dict[str, FakeSequence] = field(default_factory=dict)
    seen: list[FakeSequence] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    refuse: str | None = None
    num_steps: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        if self.refuse:
            raise RequestError(self.refuse, param="prompt")
        sequence = FakeSequence(list(prompt_token_ids), params)
        self.seen.append(sequence)
        self.sequences[request_id] = sequence

    def abort(self, request_id: str) -> None:
        if self.sequences.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_work(self) -> bool:
        return bool(self.sequences)

    def step(self) -> list[RequestOutput]:
        self.gate.wait()
        time.sleep(self.step_s)
        self.num_steps += 1
        if self.num_steps == self.die_at_step:
            raise RuntimeError("CUDA error: device-side\nassert")
        outputs = [self._advance(i, s) for i, s in list(self.sequences.items())]
        for output in outputs:
            if output.finished:
                del self.sequences[output.request_id]
        return outputs

    def _advance(self, request_id: str, sequence: FakeSequence) -> RequestOutput:
        params = sequence.params
        letter = self.script[sequence.made]
        sequence.made += 1
        reason = self.finish_with
        if reason is None and sequence.made == len(self.script):
            reason = "stop"
        if reason is None and sequence.made == params.max_tokens:
            reason = "length"
        token = ord(letter)
        logprobs = None
        if params.logprobs is not None:
            top = tuple((token + i, -1.0 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token, -1.0, top),)
        return RequestOutput(
            request_id=request_id,
            text=letter,
            token_ids=(token,),
            logprobs=logprobs,
            finish_reason=reason,
            error="row holds NaN" if reason == "error" else None,
            num_prompt_tokens=len(sequence.prompt),
            num_generated_tokens=sequence.made,
        )


@dataclass
class Server:
    """A running application on a fake engine."""

    app: FastAPI
    engine: FakeEngine
    worker: AsyncEngine
    client: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"model": "fake", **body})

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"prompt": "hi", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return await self.post("/v1/chat/completions", **{"messages": messages, **body})


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine, config: ServeConfig | None = None) -> AsyncIterator[Server]:
    config = ServeConfig() if config is None else config
    limits = config.limits
    worker = AsyncEngine(
        engine, max_active=limits.max_active_sequences, hang_timeout_s=limits.hang_timeout_s
    )
    app = create_app(worker, ServedModel("fake", FakeTokenizer(), MAX_MODEL_LEN), config)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        try:
            yield Server(app, engine, worker, client)
        finally:
            engine.gate.set()


def run_with(
    test: Callable[[Server], Awaitable[None]],
    engine: FakeEngine | None = None,
    config: ServeConfig | None = None,
) -> None:
    """Run an async test against a server on `engine`."""

    async def main() -> None:
        async with serving(FakeEngine() if engine is None else engine, config) as server:
            await test(server)

    asyncio.run(main())


class Connection:
    """One raw ASGI request whose body chunks are seen as they come and that can be cut."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: list[dict[str, Any]] = []
        self.task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self.task = asyncio.create_task(self._app(self._scope, self._inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def eventually(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    """Wait until the condition holds; fail after `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        await asyncio.sleep(0.005)


def events(body: bytes | str) -> list[Any]:
    """The JSON events of a stream; its last one must be [DONE] unless it ended in an error."""
    text = body.decode() if isinstance(body, bytes) else body
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    if data[-1] == "[DONE]":
        return [json.loads(item) for item in data[:-1]]
    parsed = [json.loads(item) for item in data]
    assert "error" in parsed[-1], "a stream without [DONE] must end in an error"
    return parsed

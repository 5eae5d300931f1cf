"""One engine in its own thread, fed and read from asyncio.

The thread is the only place that touches the engine: it takes commands (add, abort, stop) between
steps and hands outputs to the event loop. An engine that raises from `step` is dead: every open
request fails at once, and so does every later one. Everything else here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from model1.engine.request import RequestOutput, SamplingParams
from model1.errors import EngineError, Model1Error, RequestError

logger = logging.getLogger(__name__)

DEAD = "the engine stopped after an internal error"
STOPPING = "the server is shutting down"
STOP_GRACE_S = 2.0  # for the step in progress when the server ends


class EngineLike(Protocol):
    """The part of `model1.engine.Engine` that the server uses."""

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue one request; a bad one raises RequestError."""
        ...

    def abort(self, request_id: str) -> None:
        """End one request; an unknown id is ignored."""
        ...

    def step(self) -> list[RequestOutput]:
        """Compute one step."""
        ...

    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        ...


class EngineUnavailable(Model1Error):
    """Full, shutting down or dead: the request was not taken, or was given up; try elsewhere."""


class Job(NamedTuple):
    """One sequence to generate."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Event:
    """One output of the job at place `index` of a submission."""

    index: int
    output: RequestOutput


class Submission:
    """The outputs of some jobs, in the order the engine made them; `async with` aborts the rest.

    Iterating ends after each job's final output, or raises the error that ended the submission.
    """

    def __init__(self, engine: AsyncEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
        self._request_ids = tuple(request_ids)
        self._num_open = len(request_ids)
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def put(self, event: Event | Exception) -> None:
        """Called by the engine's owner on the event loop."""
        self._events.put_nowait(event)

    def close(self) -> None:
        """Abort whatever is still running."""
        self._engine.abort(self._request_ids)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._num_open == 0:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Exception):
            self._num_open = 0
            raise event
        self._num_open -= event.output.finished
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncEngine:
    """Owns the engine thread. `start` and every other method are called on the event loop."""

    def __init__(
        self, engine: EngineLike, *, max_active: int = 256, hang_timeout_s: float = 60.0
    ) -> None:
        self._engine = engine
        self._max_active = max_active
        self._hang_timeout_s = hang_timeout_s
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._routes: dict[str, tuple[Submission, int]] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="model1-engine", daemon=True)
        self._is_dead = False
        self._stopping = False
        self._progress_at = time.monotonic()

    def start(self) -> None:
        """Start the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_active(self) -> int:
        """Sequences submitted and not finished."""
        return len(self._routes)

    @property
    def is_ready(self) -> bool:
        """Alive, accepting, and either idle or making progress."""
        if self._is_dead or self._stopping or not self.is_running:
            return False
        return not self._routes or time.monotonic() - self._progress_at < self._hang_timeout_s

    def submit(self, jobs: Sequence[Job]) -> Submission:
        """Queue the jobs together, or raise EngineUnavailable."""
        if self._is_dead:
            raise EngineUnavailable(DEAD)
        if self._stopping or self._loop is None:
            raise EngineUnavailable(STOPPING)
        if len(self._routes) + len(jobs) > self._max_active:
            raise EngineUnavailable(
                f"the queue is full: {len(self._routes)} sequences are active, "
                f"at most {self._max_active} may be"
            )
        if not self._routes:
            self._progress_at = time.monotonic()
        request_ids = [f"r{next(self._ids)}" for _ in jobs]
        submission = Submission(self, request_ids)
        for index, (request_id, job) in enumerate(zip(request_ids, jobs, strict=True)):
            self._routes[request_id] = (submission, index)
            self._commands.put(lambda i=request_id, j=job: self._add(i, j))
        return submission

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests and free what they hold; finished ones are ignored."""
        for request_id in request_ids:
            if self._routes.pop(request_id, None) is not None:
                self._commands.put(lambda i=request_id: self._engine.abort(i))

    def drain(self) -> None:
        """Accept nothing more; what runs goes on."""
        self._stopping = True

    def abort_all(self) -> None:
        """End every open request with EngineUnavailable."""
        self._stopping = True
        request_ids = list(self._routes)
        for submission in {id(s): s for s, _ in self._routes.values()}.values():
            submission.put(EngineUnavailable(STOPPING))
        self.abort(request_ids)

    @property
    def is_running(self) -> bool:
        """The thread exists, be it waiting or in a step."""
        return self._thread.is_alive()

    async def stop(self) -> None:
        """End every request and the thread, waiting STOP_GRACE_S for a step in progress."""
        self.abort_all()
        self._commands.put(None)
        if self.is_running:
            await asyncio.to_thread(self._thread.join, STOP_GRACE_S)

    # The engine thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._engine.has_work():
                    outputs = self._engine.step()
                    self._progress_at = time.monotonic()
                    if outputs:
                        self._post(lambda o=outputs: self._deliver(o))
        except Exception:
            logger.exception("the engine died")
            self._post(self._die)

    def _take_commands(self) -> bool:
        """Run queued commands, waiting for one when there is nothing else to do."""
        while not (self._commands.empty() and self._engine.has_work()):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _add(self, request_id: str, job: Job) -> None:
        try:
            self._engine.add_request(request_id, job.prompt_token_ids, job.params)
        except RequestError as error:
            self._post(lambda e=error: self._fail(request_id, e))

    def _post(self, call: Callable[[], None]) -> None:
        if self._loop is None:
            raise AssertionError("the engine thread runs before start()")
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._commands.put(None)

    # Back on the event loop.

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue  # aborted by its client meanwhile
            if output.finished:
                del self._routes[output.request_id]
            submission, index = route
            submission.put(Event(index, output))

    def _fail(self, request_id: str, error: Exception) -> None:
        route = self._routes.pop(request_id, None)
        if route is not None:
            route[0].put(error)

    def _die(self) -> None:
        self._is_dead = True
        for request_id in list(self._routes):
            self._fail(request_id, EngineError(DEAD))

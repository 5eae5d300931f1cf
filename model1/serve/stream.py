"""Running a plan: collected into one JSON answer, or streamed as server-sent events.

The first output is awaited before any byte is sent, so a request that fails early gets a proper
status. Later failures arrive as an `error` event without the closing `[DONE]`. A client that
leaves ends its sequences in both modes, while they are queued, in prefill or generating.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model1.engine.request import RequestOutput
from model1.errors import Model1Error
from model1.serve.body import until_disconnect
from model1.serve.errors import ApiError, from_model1, json_response
from model1.serve.plan import Plan
from model1.serve.responses import Choice, Json, ResponseFormat
from model1.serve.worker import AsyncEngine, Event, Submission

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # asks a reverse proxy to pass events on at once
}


async def respond(
    request: Request, engine: AsyncEngine, plan: Plan, form: ResponseFormat
) -> Response:
    """Submit the plan; the JSON answer, or the stream once its first output is there."""
    submission = engine.submit(plan.jobs)
    try:
        if plan.stream:
            first = await until_disconnect(request, _next(submission))
            return EventStream(request, submission, first, plan, form)
        answer = await until_disconnect(request, _collect(submission, plan, form))
    except BaseException:
        submission.close()
        raise
    return json_response(answer)


async def _next(submission: Submission) -> Event:
    event = await anext(submission)
    _check(event.output)
    return event


async def _collect(submission: Submission, plan: Plan, form: ResponseFormat) -> Json:
    choices = [Choice(index) for index in range(len(plan.jobs))]
    async for event in submission:
        _check(event.output)
        choices[event.index].add(event.output)
    return form.whole(choices)


def _check(output: RequestOutput) -> None:
    """Raise for an output that is no answer."""
    if output.finish_reason == "error":
        message = output.error or "generation failed"
        raise ApiError(500, message, code="generation_error")
    if output.finish_reason == "abort":
        raise ApiError(503, "the request was aborted by the server", code="aborted")


class EventStream(Response):
    """The rest of a submission as server-sent events; owns the submission."""

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        submission: Submission,
        first: Event,
        plan: Plan,
        form: ResponseFormat,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._request = request
        self._submission = submission
        self._first = first
        self._plan = plan
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end, an error, or the client leaves."""
        async with self._submission:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            with contextlib.suppress(ClientDisconnect):
                await until_disconnect(self._request, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except (ApiError, Model1Error) as error:
            refusal = error if isinstance(error, ApiError) else from_model1(error)
            logger.error("stream %s failed: %s", self._plan.response_id, refusal.message)
            data = _event(refusal.body())
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        choices = [Choice(index) for index in range(len(self._plan.jobs))]
        opened: set[int] = set()
        event = self._first
        while True:
            _check(event.output)
            if event.index not in opened:
                opened.add(event.index)
                opening = self._form.opening(event.index)
                if opening is not None:
                    yield _event(opening)
            choice = choices[event.index]
            choice.num_generated = event.output.num_generated_tokens
            if event.output.text or event.output.logprobs or event.output.finished:
                yield _event(self._form.chunk(choice, event.output))
            try:
                event = await anext(self._submission)
            except StopAsyncIteration:
                break
        if self._plan.include_usage:
            yield _event(self._form.usage_chunk(choices))
        yield DONE


def _event(data: Json) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"

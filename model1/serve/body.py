"""Reading a request: the body within its limits, strict JSON, and noticing that the client left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from model1.serve.config import Limits
from model1.serve.errors import ApiError, from_validation

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

MAX_KEYS = 512  # of one object; every wrong one costs time in the checks that follow


async def read_request(request: Request, kind: type[B], limits: Limits, max_model_len: int) -> B:
    """The body as a checked `kind`; raises ApiError 400, 408, 413 or 415.

    A prompt that is too long for the context `max_model_len` mostly gets through to the check that
    counts its tokens; 413 is for what is far beyond.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # Browsers send other types across origins without asking the server first.
        raise ApiError(415, "the Content-Type header must be application/json")
    data = parse_json(await _read_body(request, limits, max_model_len))
    if not isinstance(data, dict):
        raise ApiError(400, "the request body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None


async def _read_body(request: Request, limits: Limits, max_model_len: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    limit, timeout_s = limits.body_bytes(max_model_len), limits.body_timeout_s
    too_large = ApiError(
        413,
        f"the request body is larger than {limit} bytes, which no prompt within the context of "
        f"{max_model_len} tokens needs",
    )
    if not declared.isdigit() or int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {timeout_s:g} s") from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """RFC 8259 JSON; NaN, Infinity, lone surrogates, bad UTF-8 and repeated keys are errors."""
    try:
        value = orjson.loads(body)
        # orjson keeps the last of repeated keys; another reader on the way may keep the first.
        json.loads(body, object_pairs_hook=_check_keys)
    except ValueError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the request body is not valid JSON: nested too deeply") from None
    return value


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has more than {MAX_KEYS} keys")
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("an object repeats a key")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled.

    Raises ClientDisconnect then. The request body must have been read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

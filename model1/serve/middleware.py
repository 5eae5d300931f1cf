"""What every request passes: the API key, the log line, and a last guard against our own bugs.

Plain ASGI classes, because they must not hide a disconnect from the handlers.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model1.serve.errors import ApiError, shown

logger = logging.getLogger(__name__)

# Everything else needs the key, unknown paths included.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'"),
)
CLIENT_CLOSED = 499  # logged when a client leaves before its answer


def key_matches(authorization: str, api_key: str) -> bool:
    """Whether an Authorization header carries the key; its time tells nothing about the key."""
    scheme, _, given = authorization.partition(" ")
    digests = (hashlib.sha256(text.encode()).digest() for text in (given.strip(), api_key))
    return hmac.compare_digest(*digests) and scheme.lower() == "bearer"


class ApiKeyMiddleware:
    """Answers 401 unless the request carries the key or asks for an open path."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(headers) == 1 and key_matches(headers[0].decode("latin-1"), self._api_key):
            await self.app(scope, receive, send)
            return
        message = "wrong API key" if headers else "no API key: send 'Authorization: Bearer KEY'"
        refusal = ApiError(401, message, code="invalid_api_key")
        await refusal.response()(scope, receive, send)


class GuardMiddleware:
    """Logs one line per request and turns an unexpected exception into a 500 answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request and log method, path, status and duration."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_SECURITY_HEADERS]}
            await send(message)

        start = time.monotonic()
        try:
            await self.app(scope, receive, send_noting_status)
        except Exception:
            logger.exception("%s %s failed", scope["method"], shown(scope["path"]))
            if status != CLIENT_CLOSED:  # the answer has begun: only a cut tells the client
                raise _Aborted from None
            failure = ApiError(500, "internal error; see the server log", code="internal_error")
            await failure.response()(scope, receive, send_noting_status)
        finally:
            took_ms = (time.monotonic() - start) * 1e3
            level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
            place = shown(scope["path"])
            logger.log(level, "%s %s %d %.0f ms", scope["method"], place, status, took_ms)


class _Aborted(Exception):
    """Tells the HTTP server to cut the connection; the cause is already logged."""

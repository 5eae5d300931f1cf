"""Every refusal of the server in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import ValidationError
from starlette.responses import Response

from model1.errors import EngineError, Model1Error, RequestError, TokenizerError
from model1.serve.worker import EngineUnavailable

MAX_SHOWN_CHARS = 64  # of a client's value inside a message
RETRY_AFTER_S = 1

_TYPES = {401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """An answer other than 2xx; raised anywhere while a request is handled."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object sent to the client."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole HTTP answer."""
        headers = {}
        if self.status == 503:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def json_response(
    body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON answer written by orjson: UTF-8, never NaN."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def shown(value: object) -> str:
    """A client's value, short and on one ASCII line."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def from_validation(error: ValidationError) -> ApiError:
    """The first broken rule, with the place as `param`: temperature, messages[0].role, ..."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].replace("Input should be", "must be", 1)
    context = first.get("ctx", {})
    if first["type"] == "bad_field":
        return ApiError(400, f"{context['field']} {message}", param=context["field"])
    param = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param}"
    elif first["type"] == "missing":
        message = f"{param} is required"
    elif first["type"] == "bad_value":
        message = f"{param}: {message}"
    else:
        message = f"{param}: {message}, got {shown(first['input'])}"
    return ApiError(400, message, param=param or None)


def _place(location: tuple[int | str, ...]) -> str:
    place = ""
    for step in location:
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            name = step if step.isidentifier() else shown(step)
            place += f".{name}" if place else name
    return place


def from_model1(error: Model1Error) -> ApiError:
    """An error of a lower layer as an answer: the client's fault is 400, ours is 500."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, TokenizerError):
        return ApiError(400, str(error))
    if isinstance(error, EngineUnavailable):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, str(error))

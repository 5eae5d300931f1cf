"""The HTTP application: routes, error answers, readiness. Built per engine, without globals."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model1.errors import Model1Error
from model1.serve.body import read_request, until_disconnect
from model1.serve.config import ServeConfig
from model1.serve.errors import ApiError, from_model1, json_response, shown
from model1.serve.middleware import CLIENT_CLOSED, ApiKeyMiddleware, GuardMiddleware
from model1.serve.plan import ServedModel, plan_chat, plan_completion
from model1.serve.protocol import ChatRequest, CompletionRequest
from model1.serve.responses import ChatFormat, CompletionFormat
from model1.serve.stream import respond
from model1.serve.worker import AsyncEngine

logger = logging.getLogger(__name__)


def create_app(engine: AsyncEngine, model: ServedModel, config: ServeConfig) -> FastAPI:
    """The application that serves `model` with `engine`; its lifespan owns the engine thread."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="Model1", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_health_routes(app, engine)
    _add_model_routes(app, model)
    _add_generation_routes(app, engine, model, config)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(Model1Error, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if config.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=config.api_key)
    app.add_middleware(GuardMiddleware)
    return app


def _add_health_routes(app: FastAPI, engine: AsyncEngine) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return json_response({"status": "live"})

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> Response:
        """Requests would be served now: 200, else 503."""
        if engine.is_ready:
            return json_response({"status": "ready"})
        raise ApiError(503, "the engine is not ready", code="not_ready")


def _add_model_routes(app: FastAPI, model: ServedModel) -> None:
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "model1",
        "max_model_len": model.max_model_len,
        "kv_bytes_per_token": model.kv_bytes_per_token,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model of this server."""
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model_by_name(name: str) -> Response:
        """The model of that name, or 404."""
        model.check_name(name)
        return json_response(card)


def _add_generation_routes(
    app: FastAPI, engine: AsyncEngine, model: ServedModel, config: ServeConfig
) -> None:
    limits, context = config.limits, model.max_model_len

    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        body = await read_request(request, CompletionRequest, limits, context)
        plan = await until_disconnect(request, plan_completion(body, model, limits))
        return await respond(request, engine, plan, CompletionFormat(plan, model))

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_request(request, ChatRequest, limits, context)
        plan = await until_disconnect(request, plan_chat(body, model, limits))
        return await respond(request, engine, plan, ChatFormat(plan, model))


def _body_schema(kind: type[CompletionRequest] | type[ChatRequest]) -> dict[str, object]:
    # The body is read by read_request, so FastAPI has to be told what it is.
    schema = kind.model_json_schema()
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Model1Error):
        answer = from_model1(error)
    elif isinstance(error, HTTPException):
        answer = ApiError(error.status_code, str(error.detail))
    else:
        assert isinstance(error, ApiError)
        answer = error
    level = logging.ERROR if answer.status >= 500 else logging.INFO
    logger.log(level, "%s: %d %s", shown(request.url.path), answer.status, answer.message)
    response = answer.response()
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)

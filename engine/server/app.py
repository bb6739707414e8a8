"""Puts the HTTP application together."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from engine.errors import RequestError
from engine.server.api_errors import ApiError, from_request_error, invalid_request
from engine.server.chat_route import chat_router
from engine.server.completion_route import completion_router
from engine.server.dashboard import dashboard_router
from engine.server.gate import Gate
from engine.server.json_text import to_json
from engine.server.metrics_route import metrics_router
from engine.server.model_routes import model_router
from engine.server.service import Service

_MAX_SHOWN_PROBLEMS = 3


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application.

    Args:
        service: The server's state.
    """
    app = FastAPI(
        title="NEO",
        version=metadata.version("neo-llm"),
        description="OpenAI-compatible serving of a language model.",
        separate_input_output_schemas=False,
    )
    for make_router in (
        completion_router,
        chat_router,
        model_router,
        metrics_router,
        dashboard_router,
    ):
        app.include_router(make_router(service))
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    _leave_out_422(app)
    return Gate(
        app,
        api_keys=service.config.api_keys,
        max_body_bytes=service.config.max_body_bytes,
        metrics=service.metrics,
    )


def _leave_out_422(app: FastAPI) -> None:
    """Keep FastAPI from documenting its own answer to invalid requests; ours is a 400."""
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make_schema()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _answer(error: ApiError) -> Response:
    return Response(
        to_json(error.body()), error.status_code, error.headers, media_type="application/json"
    )


async def _answer_validation_error(call: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    param = _param(problems[0]["loc"])
    # Every member of a union has its say; what concerns other fields is left for the next try.
    texts = [str(item["msg"]) for item in problems if _param(item["loc"]) == param]
    message = "; or: ".join(list(dict.fromkeys(texts))[:_MAX_SHOWN_PROBLEMS])
    if param is None and "json" not in call.headers.get("content-type", ""):
        message = "send the request as JSON, with the header Content-Type: application/json"
    return _answer(invalid_request(f"{param}: {message}" if param else message, param))


def _param(location: Sequence[int | str]) -> str | None:
    """Return the field that a location begins with, and its place in a list."""
    names = list(location[1:])
    if not names or not isinstance(names[0], str):
        return None
    place = f"[{names[1]}]" if len(names) > 1 and isinstance(names[1], int) else ""
    return f"{names[0]}{place}"


async def _answer_request_error(call: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(from_request_error(error))


async def _answer_http_error(call: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        error = ApiError(
            error.status_code,
            str(error.detail),
            "invalid_request_error",
            headers=dict(error.headers or {}),
        )
    return _answer(error)


async def _answer_bug(call: Request, error: Exception) -> Response:
    return _answer(ApiError(500, "internal error; see the server's log", "server_error"))

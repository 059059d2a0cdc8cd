"""What clients are told when a request fails, always in OpenAI's shape.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import (
    ConfigError,
    EngineUnavailableError,
    QueueFullError,
    RankLostError,
    RequestAbortedError,
    RequestTimeoutError,
)
from .disconnect import ClientDisconnectedError

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1000
"""Longest message; a client's input may be quoted in it."""

CLIENT_CLOSED_REQUEST = 499
"""As nginx calls it: the client left, or somebody aborted the request."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "request_aborted",
    504: "timeout_error",
}
_NAMED = re.compile(r"([a-z][a-z0-9_]*) (?:is|has|holds) ")
_GRAMMAR_PLACE = re.compile(r"^at \d+\(\d+\): | 1 \| .*$", re.DOTALL)
"""Where in a grammar a mistake is."""
_NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """A request that fails, with everything that its client is told.

    Args:
        status: HTTP status.
        message: for people; names the value and the limit.
        type: OpenAI's class of errors; by default that of the status.
        param: the field at fault.
        code: short machine-readable reason.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "api_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        error = {"message": message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encode(self) -> bytes:
        """The body as JSON; ASCII only, as a message may quote half a surrogate pair."""
        return json.dumps(self.body()).encode("ascii")

    def response(self) -> Response:
        """The whole response."""
        return Response(self.encode(), self.status, self.headers, "application/json")


def invalid_field(name: str, what: str, code: str = "invalid_value") -> ApiError:
    """A field with a value that it cannot have, e.g. ``what="is 3 without stream"``."""
    return ApiError(400, f"{name} {what}", param=name, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an exception; details of our own mistakes stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        message = str(error)
        return ApiError(400, message, param=_param_of(message), code="invalid_value")
    if isinstance(error, QueueFullError):
        headers = _retry_after(error.retry_after_s)
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, RequestTimeoutError):
        status = 503 if error.kind == "queue" else 504
        headers = _retry_after(1.0) if error.kind == "queue" else _NO_RETRY
        return ApiError(status, str(error), code=f"{error.kind}_timeout", headers=headers)
    if isinstance(error, RequestAbortedError):
        return ApiError(
            CLIENT_CLOSED_REQUEST, str(error), code="request_aborted", headers=_NO_RETRY
        )
    if isinstance(error, EngineUnavailableError):
        headers = _NO_RETRY if error.retry_after_s is None else _retry_after(error.retry_after_s)
        code = "engine_error" if error.state == "running" else f"engine_{error.state}"
        return ApiError(503, str(error), code=code, headers=headers)
    if isinstance(error, RankLostError):  # of a call that was the first to meet it
        return ApiError(503, str(error), code="engine_dead", headers=_NO_RETRY)
    logger.error("a request failed for a reason of ours", exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")


def renamed_error(error: ConfigError, field_names: Mapping[str, str]) -> ApiError:
    """A refusal by the engine, in the words of a request whose fields have names of their own.

    A form that was made of a field is not quoted: its client never saw it.
    """
    failure = as_api_error(error)
    name = failure.param
    if name is None or name not in field_names:
        return failure
    failure.param = field_names[name]
    _, refused, reason = failure.message.partition("; it cannot be compiled: ")
    if refused:
        reason = _GRAMMAR_PLACE.sub("", reason)
        failure.message = f"{failure.param} has a form that cannot be enforced: {reason}"
    else:
        failure.message = failure.param + failure.message.removeprefix(name)
    return failure


def output_error(message: str, kind: str | None) -> ApiError:
    """A request that the engine ended: the KV cache cannot hold it, or it left no way to go on."""
    if kind == "request":
        return ApiError(400, message, code="cannot_generate")
    return ApiError(503, message, code="kv_cache_exhausted", headers=_NO_RETRY)


class FailureMiddleware:
    """Answers what nobody expected, inside of what names and counts responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if scope["type"] != "http" or has_started:
                raise
            await as_api_error(error).response()(scope, receive, send)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""

    def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (
        ApiError,
        ConfigError,
        QueueFullError,
        EngineUnavailableError,
        RankLostError,
        RequestTimeoutError,
        RequestAbortedError,
    ):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnectedError, _answer_nobody)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)


def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


def validation_error(errors: Any) -> ApiError:
    """The first finding of pydantic, in OpenAI's words."""
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    param = ".".join(str(part) for part in where) or None
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", message)
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(
            400, f"{param} is not a known parameter", param=param, code="unknown_parameter"
        )
    if kind == "unsupported_parameter":
        return ApiError(400, f"{param} is {message}", param=param, code="unsupported_parameter")
    if kind == "missing":
        what = param or "the body"
        return ApiError(400, f"{what} is missing", param=param, code="missing_required_parameter")
    if param is None and kind.endswith("_attributes_type"):
        message = "the body must be a JSON object, sent as Content-Type: application/json"
    text = f"{param}: {message}" if param else message
    if "input" in first and isinstance(first["input"], str | int | float | bool | None):
        text += f"; it is {first['input']!r:.100}"
    return ApiError(400, text, param=param, code="invalid_value")


def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        message = f"{request.method} {request.url.path} is not a known path"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
        headers["Allow"] = _methods_of(request) or headers.get("Allow", "")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=headers).response()


def _methods_of(request: Request) -> str:
    """Methods of a path; the router names those of the first route only."""
    methods = {
        method.upper()
        for path, operations in request.app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    }
    return ", ".join(sorted(methods))


def _param_of(message: str) -> str | None:
    """The field that a ``ConfigError`` is about: its texts start with the name."""
    found = _NAMED.match(message)
    return None if found is None else found[1]


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}

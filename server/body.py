"""Reads the body of a request whole, bounded in size and time, before anybody sees it.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError

MAX_SIZE_DIGITS = 18
"""Digits of the longest length that is worth reading as a number."""


class BodyMiddleware:
    """Answers 413 for a body that is too long, 408 for one that takes too long to come, 415 for one
    that is compressed.

    What ``receive`` gives afterwards is the body in one piece, then the client's disconnect.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._max_bytes = config.max_body_bytes
        self._timeout_s = config.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout_s)
        except asyncio.TimeoutError:
            error = ApiError(
                408,
                f"the body did not arrive within {self._timeout_s:g} seconds",
                code="body_timeout",
                headers={"connection": "close"},
            )
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            # The connection stays: one that is closed while data comes is reset, and the client
            # may never see the answer. What still comes of the body is read and dropped.
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client left
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise ApiError(
                415,
                f"content-encoding is {headers['content-encoding']!r:.100}; send the body as it is",
                code="unsupported_content_encoding",
            )
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            digits = declared.lstrip("0")
            if len(digits) > MAX_SIZE_DIGITS or int(digits or "0") > self._max_bytes:
                raise self._too_long(f"{digits:.{MAX_SIZE_DIGITS}} bytes")
        chunks: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > self._max_bytes:
                raise self._too_long(f"more than {self._max_bytes} bytes")
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_long(self, size: str) -> ApiError:
        return ApiError(
            413,
            f"the body has {size}; the limit is {self._max_bytes} (--max-body-bytes)",
            code="body_too_large",
        )

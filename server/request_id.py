"""A name for every HTTP request, echoed in its response.

Owns: the context variable that logs read.  Thread-safety: context-local.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"

request_id_var: ContextVar[str] = ContextVar("vmalloc_request_id", default="-")
"""The request that the current task works on."""

_VALID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Takes the client's ``X-Request-Id`` if it is 1 to 128 ASCII characters, else makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        request_id = given if given and _VALID.fullmatch(given) else uuid.uuid4().hex
        request_id_var.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)

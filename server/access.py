"""Watches every request from its head to the end of its response.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import log_access
from .request_record import RequestRecord
from .state import ServerState

NO_STATUS = 499
"""What a request is counted under whose client left before there was a status."""


class AccessMiddleware:
    """Gives a request its record; at the end tells the metrics, the log and the trace."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = self._state
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        record = RequestRecord(state.metrics, scope["method"], path)
        record.attach(scope)
        status, is_complete = NO_STATUS, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_complete = True

        tracer = state.tracer
        span = nullcontext() if tracer is None else tracer.span(scope, record, lambda: status)
        with span:
            try:
                await self._app(scope, receive, watch)
            except BaseException:
                status = 500 if status == NO_STATUS else status
                raise
            finally:
                # What is not declared has no route: any name would make a series of its own.
                route = getattr(scope.get("route"), "path", "other")
                seconds = time.monotonic() - record.started
                state.metrics.observe_http(scope["method"], route, status, seconds)
                log_access(record, status, is_complete=is_complete)

"""The door of an application: takes every HTTP request, and finds who answers it.

Owns: the count of requests in it.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..auth import AuthMiddleware
from ..body import BodyMiddleware
from ..disconnect import ClientDisconnectedError, run_while_connected
from ..errors import ApiError, FailureMiddleware
from ..request_id import HEADER
from ..root_path import RootPathMiddleware
from .everyone import Everyone
from .forwarding import Forwarder
from .messages import ReplicaRequest
from .prefix_keys import prefix_keys
from .reply_writer import REPLICA_HEADER
from .settings import ReplicaSettings

DRAIN_POLL_SECONDS = 0.05


class Ingress:
    """What Serve's proxies send requests to. Serve asks it for its ASGI application.

    Args:
        settings: of the application.
        handle: Serve's handle of ``Replica``.
    """

    def __init__(self, settings: ReplicaSettings, handle: Any) -> None:
        self._settings = settings
        self._root_path = settings.server.root_path.rstrip("/")
        self._forwarder = Forwarder(handle, settings.replicas.route_timeout_s)
        self._everyone = Everyone(handle)
        self._num_live = 0

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """For Serve: the application, with what a lone server does before its routes."""
        config = self._settings.server
        app: ASGIApp = FailureMiddleware(self._serve)
        app = BodyMiddleware(app, config)
        app = AuthMiddleware(app, config)
        if config.allowed_origins:
            # Asked before a key is: here, so not in the replicas too.
            app = CORSMiddleware(
                app,
                allow_origins=list(config.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[HEADER, "retry-after", REPLICA_HEADER.decode()],
            )
        return RootPathMiddleware(app, config.root_path)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that there are; whether all ended in time."""
        self._everyone.is_draining = True
        deadline = time.monotonic() + timeout_s
        while self._num_live and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        return self._num_live == 0

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = (await receive()).get("body", b"")
        request = self._read(scope, body)
        try:
            await run_while_connected(receive, self._answer(scope, receive, request, send))
        except ClientDisconnectedError:
            return

    async def _answer(
        self, scope: Scope, receive: Receive, request: ReplicaRequest, send: Send
    ) -> None:
        response = await self._everyone.answer(request)
        if response is not None:
            await response(scope, receive, send)
            return
        if self._everyone.is_draining:
            raise ApiError(
                503,
                "the server is shutting down",
                code="engine_draining",
                headers={"retry-after": "1"},
            )
        self._num_live += 1
        try:
            await self._forwarder.forward(request, send)
        finally:
            self._num_live -= 1

    def _read(self, scope: Scope, body: bytes) -> ReplicaRequest:
        path = scope["path"].removeprefix(self._root_path)
        client, server = scope.get("client"), scope.get("server")
        return ReplicaRequest(
            method=scope["method"],
            path=path,
            query=scope.get("query_string", b""),
            headers=tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            body=body,
            scheme=scope.get("scheme", "http"),
            client=None if client is None else (client[0], client[1]),
            server=None if server is None else (server[0], server[1]),
            keys=prefix_keys(path, body),
        )

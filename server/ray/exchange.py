"""Runs one HTTP request through an ASGI application of the same process.

Owns: the application's task.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message

from .messages import ReplicaRequest, ReplyHead

_running: set[asyncio.Task[None]] = set()
"""What still runs after its client left, so that it is not collected."""


class Exchange:
    """One request and the answer that comes of it.

    Args:
        app: what answers.
        request: the request.
    """

    def __init__(self, app: ASGIApp, request: ReplicaRequest) -> None:
        self._app = app
        self._request = request
        self._head: ReplyHead | None = None
        self._chunks: list[bytes] = []
        self._has_news = asyncio.Event()
        self._client_left = asyncio.Event()
        self._is_body_read = False

    async def parts(self) -> AsyncIterator[ReplyHead | bytes]:
        """The head, then the body as it comes. Closing the iterator, or cancelling whoever waits at
        it, tells the application that its client left; it ends by itself."""
        task = asyncio.ensure_future(self._run())
        _running.add(task)
        task.add_done_callback(_running.discard)
        task.add_done_callback(lambda _: self._has_news.set())
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                is_over = task.done()  # before what it left is taken
                if self._head is not None:
                    head, self._head = self._head, None
                    yield head
                chunks, self._chunks = self._chunks, []
                if data := b"".join(chunks):
                    yield data
                if is_over:
                    task.result()
                    return
        finally:
            self._client_left.set()

    async def _run(self) -> None:
        request = self._request
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.scheme,
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": request.query,
            "root_path": "",
            "headers": list(request.headers),
            "client": request.client,
            "server": request.server,
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._is_body_read:
            self._is_body_read = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._client_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
            self._head = ReplyHead(message["status"], headers)
        elif chunk := message.get("body", b""):
            self._chunks.append(bytes(chunk))
        self._has_news.set()

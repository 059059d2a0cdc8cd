"""Requests that are for all replicas: how they are, what they count, what they are told.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from starlette.datastructures import Headers as HeaderReader
from starlette.responses import JSONResponse, Response, StreamingResponse

from .. import sse
from ..errors import ApiError
from ..metrics_routes import CONTENT_TYPE
from .messages import ReplicaRequest, Reply
from .metrics_merge import merge_metrics
from .page_map_merge import merge_frames

ASK_SECONDS = 3.0
"""Longest wait for the answer of each; probes of orchestrators are not patient."""

FRAME_SECONDS = 0.5
"""Between two page maps for whoever watches."""


class Everyone:
    """All replicas, asked at once.

    Args:
        handle: Serve's handle of ``Replica``.

    Attributes:
        is_draining: set when the application is about to end: streams without an end should.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.is_draining = False

    async def answer(self, request: ReplicaRequest) -> Response | None:
        """The answer to a request that concerns all of them; None for one that concerns one."""
        path, is_read = request.path, request.method in ("GET", "HEAD")
        if path in ("/health", "/ready") and is_read:
            return await self._health(request)
        if path == "/metrics" and is_read:
            return await self._metrics(request)
        if path in ("/page-map", "/page-map/events") and is_read:
            return await self._page_map(request)
        if path == "/abort" or path.startswith("/admin/"):
            return await self._told(request)
        return None

    async def ask(self, request: ReplicaRequest) -> list[Reply]:
        """The answers of all that answer in time. Raises ``ApiError`` where there are none."""
        try:
            # Serve's own way to wait loses all answers when one is late.
            results = await self._handle.broadcast(
                "answer_whole", request
            )._fetch_replica_results_async()
        except DeploymentUnavailableError:
            results = []
        waits = [asyncio.wait_for(result.get_async(), ASK_SECONDS) for result in results]
        answers = await asyncio.gather(*waits, return_exceptions=True)
        replies = [one for one in answers if isinstance(one, Reply)]
        if not replies:
            raise ApiError(
                503,
                f"none of {len(results)} replicas answered within {ASK_SECONDS:g} seconds",
                code="no_replica",
                headers={"retry-after": "1"},
            )
        return sorted(replies, key=lambda reply: reply.replica)

    async def _health(self, request: ReplicaRequest) -> Response:
        """200 while one of them says so."""
        try:
            replies = await self.ask(request)
        except ApiError as error:
            nobody = {"status": "starting", "failure": error.message, "replicas": []}
            return JSONResponse(nobody, 503, error.headers)
        states = [{"replica": reply.replica, **_json(reply)} for reply in replies]
        # The best of them says what a lone server would.
        best = min(replies, key=lambda reply: reply.status)
        headers = {} if best.status == 200 else {"retry-after": "1"}
        return JSONResponse({**_json(best), "replicas": states}, best.status, headers)

    async def _metrics(self, request: ReplicaRequest) -> Response:
        replies = await self.ask(request)
        pages = {reply.replica: reply.body.decode() for reply in replies}
        return Response(merge_metrics(pages), headers={"content-type": CONTENT_TYPE})

    async def _page_map(self, request: ReplicaRequest) -> Response:
        is_watched = request.path == "/page-map/events"
        once = replace(request, path="/page-map", method="GET")
        replies = await self.ask(once)
        if (refused := _refusal(replies)) is not None:
            return refused
        if is_watched:
            headers = {**sse.HEADERS, "content-type": "text/event-stream"}
            return StreamingResponse(self._frames(once), headers=headers)
        return JSONResponse(merge_frames([_json(reply) for reply in replies]))

    async def _frames(self, request: ReplicaRequest) -> AsyncIterator[bytes]:
        while not self.is_draining:
            try:
                replies = [one for one in await self.ask(request) if one.status == 200]
            except ApiError as error:
                yield sse.event({"state": "stopped", "detail": error.message}, "state")
                return
            if replies:
                yield sse.event(merge_frames([_json(reply) for reply in replies]))
            await asyncio.sleep(FRAME_SECONDS)
        yield sse.event({"state": "draining", "detail": "the server is shutting down"}, "state")

    async def _told(self, request: ReplicaRequest) -> Response:
        """What the first one says that does not succeed, or the first one's answer with those of
        all. Only one of them knows a request that is to be aborted."""
        replies = await self.ask(request)
        if request.path == "/abort":
            replies.sort(key=lambda reply: reply.status)
            return _as_response(replies[0])
        if (refused := _refusal(replies)) is not None:
            return refused
        answers = {reply.replica: _json(reply) for reply in replies}
        return JSONResponse({**_json(replies[0]), "replicas": answers})


def _refusal(replies: Sequence[Reply]) -> Response | None:
    """The first answer that is no success."""
    for reply in replies:
        if reply.status >= 400:
            return _as_response(reply)
    return None


def _as_response(reply: Reply) -> Response:
    given = HeaderReader(raw=list(reply.headers))
    names = ("content-type", "retry-after", "www-authenticate", "allow", "x-should-retry")
    headers = {name: given[name] for name in names if name in given}
    return Response(reply.body, reply.status, headers)


def _json(reply: Reply) -> dict[str, Any]:
    document = json.loads(reply.body)
    assert isinstance(document, dict)
    return document

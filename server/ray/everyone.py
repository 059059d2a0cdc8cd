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

TELL_SECONDS = 60.0
"""The same for what each has to do, between two steps: to sleep it copies its KV, for instance."""

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
        path, method = request.path, request.method
        if path in ("/health", "/ready") and method in ("GET", "HEAD"):
            return await self._health(request)
        if path == "/metrics" and method == "GET":
            return await self._metrics(request)
        if path in ("/page-map", "/page-map/events") and method == "GET":
            return await self._page_map(request)
        if path == "/abort" or path.startswith("/admin/"):
            return await self._told(request)
        return None

    async def ask(
        self, request: ReplicaRequest, seconds: float = ASK_SECONDS
    ) -> tuple[list[Reply], int]:
        """The answers of all that answer in time, and how many did not. Raises ``ApiError`` where
        nobody did."""
        try:
            # Serve's own way to wait loses all answers when one is late.
            results = await self._handle.broadcast(
                "answer_whole", request
            )._fetch_replica_results_async()
        except DeploymentUnavailableError:
            results = []
        waits = [asyncio.wait_for(result.get_async(), seconds) for result in results]
        answers = await asyncio.gather(*waits, return_exceptions=True)
        replies = [one for one in answers if isinstance(one, Reply)]
        if not replies:
            raise ApiError(
                503,
                f"none of {len(results)} replicas answered within {seconds:g} seconds",
                code="no_replica",
                headers={"retry-after": "1"},
            )
        return sorted(replies, key=lambda reply: reply.replica), len(results) - len(replies)

    async def _health(self, request: ReplicaRequest) -> Response:
        """200 while one of them says so, but none is ready for requests that the door is shut
        for."""
        try:
            replies, _ = await self.ask(request)
        except ApiError as error:
            nobody = {"status": "starting", "failure": error.message, "replicas": []}
            return JSONResponse(nobody, 503, error.headers)
        states = [{"replica": reply.replica, **_json(reply)} for reply in replies]
        # The best of them says what a lone server would.
        best = min(replies, key=lambda reply: reply.status)
        status, body = best.status, {**_json(best), "replicas": states}
        if self.is_draining and status == 200:
            body["status"] = "draining"
            status = 503 if request.path == "/ready" else 200
        return JSONResponse(body, status, {} if status == 200 else {"retry-after": "1"})

    async def _metrics(self, request: ReplicaRequest) -> Response:
        replies, _ = await self.ask(request)
        pages = {reply.replica: reply.body.decode() for reply in replies}
        return Response(merge_metrics(pages), headers={"content-type": CONTENT_TYPE})

    async def _page_map(self, request: ReplicaRequest) -> Response:
        once = replace(request, path="/page-map")
        replies, _ = await self.ask(once)
        frames = _frames_of(replies)
        if not frames:
            return _as_response(replies[0])
        if request.path == "/page-map/events":
            headers = {**sse.HEADERS, "content-type": "text/event-stream"}
            return StreamingResponse(self._events(once), headers=headers)
        return JSONResponse(merge_frames(frames))

    async def _events(self, request: ReplicaRequest) -> AsyncIterator[bytes]:
        while not self.is_draining:
            try:
                replies, _ = await self.ask(request)
            except ApiError as error:
                yield sse.event({"state": "stopped", "detail": error.message}, "state")
                return
            if frames := _frames_of(replies):
                yield sse.event(merge_frames(frames))
            await asyncio.sleep(FRAME_SECONDS)
        yield sse.event({"state": "draining", "detail": "the server is shutting down"}, "state")

    async def _told(self, request: ReplicaRequest) -> Response:
        """What the first one says that does not succeed, or the first one's answer with those of
        all. Only one of them knows a request that is to be aborted."""
        if request.path == "/abort":
            replies, _ = await self.ask(request)
            return _as_response(min(replies, key=lambda reply: reply.status))
        replies, num_silent = await self.ask(request, TELL_SECONDS)
        if (refused := _refusal(replies)) is not None:
            return refused
        if num_silent:
            names = ", ".join(reply.replica for reply in replies)
            raise ApiError(
                503,
                f"{num_silent} of {num_silent + len(replies)} replicas did not answer within "
                f"{TELL_SECONDS:g} seconds; those that did what they were told: {names}",
                code="no_replica",
                headers={"retry-after": "1"},
            )
        answers = {reply.replica: _json(reply) for reply in replies}
        return JSONResponse({**_json(replies[0]), "replicas": answers})


def _frames_of(replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """The page maps of those that have one."""
    return [_json(reply) for reply in replies if reply.status == 200]


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

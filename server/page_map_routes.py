"""The live page map over HTTP: once, or as server-sent events.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine import EngineUnavailableError
from . import sse
from .disconnect import ClientDisconnectedError, run_while_connected
from .generation import server_state
from .page_map_feed import PageMapFeed
from .protocol.operations import ErrorBody
from .protocol.page_map import PageMapFrame, PageMapState

router = APIRouter(tags=["page map"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody},
    503: {"model": ErrorBody},
}


@router.get("/page-map", responses=_ERRORS)
async def page_map(request: Request) -> PageMapFrame:
    """Every slot's pages by kind, the totals, and rates over the last two seconds in which
    somebody looked."""
    return await server_state(request).page_map.frame()


# Not in the schema: who tries all that is there would never come to the end of it.
@router.get("/page-map/events", include_in_schema=False)
async def page_map_events(request: Request) -> Response:
    """The same whenever something changed, at most four times a second."""
    state = server_state(request)
    if state.engine.state not in ("starting", "running"):
        raise EngineUnavailableError(
            state.engine.state,
            state.engine.failure or f"there is no page map: the engine is {state.engine.state}",
            1.0,
        )
    return PageMapStream(state.page_map)


class PageMapStream(Response):
    """Frames until the client leaves, or the engine ends."""

    media_type = "text/event-stream"

    def __init__(self, feed: PageMapFeed) -> None:
        super().__init__(headers=sse.HEADERS)
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        with suppress(ClientDisconnectedError):
            await run_while_connected(receive, self._send_frames(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_frames(self, send: Send) -> None:
        async with self._feed.watch() as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": _event(frame), "more_body": True})


def _event(frame: PageMapFrame | PageMapState) -> bytes:
    return sse.event(frame, "state" if isinstance(frame, PageMapState) else None)

"""``GET /metrics`` for Prometheus.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from .generation import server_state

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """The figures of the engine and of the requests so far, in Prometheus' text format."""
    state = server_state(request)
    rank_reports = await state.page_map.rank_reports()
    # Ten milliseconds of work, which no stream should wait for.
    content = await asyncio.to_thread(state.metrics.render, rank_reports)
    return Response(content, headers={"content-type": CONTENT_TYPE})

"""``GET /metrics`` for Prometheus.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from .generation import server_state

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """The figures of the engine and of the requests so far, in Prometheus' text format."""
    accept = request.headers.get("accept", "")
    content, content_type = server_state(request).metrics.render(accept)
    return Response(content, headers={"content-type": content_type})

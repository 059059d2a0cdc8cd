"""One replica: the same application that ``vmalloc serve`` runs, with an engine of its own.

Owns: the application and its engine.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from transformers.utils.logging import disable_progress_bar

from ..app import create_app
from ..health_routes import health_of
from ..logs import setup_logs
from ..run import make_state
from .exchange import Exchange
from .messages import Accepted, ReplicaRequest, Reply, ReplyHead
from .settings import ReplicaSettings

logger = logging.getLogger(__name__)

USAGE_STEP = 0.05
"""Serve tells all routers of a figure that changed; small changes are not worth it."""

_FAILED = ("stuck", "stopped", "dead")


class Replica:
    """What Serve starts, asks for its health, and ends.

    Its methods are called through a handle, or by Serve under the names that it looks for.

    Args:
        settings: of the application.

    Raises what loading the model raised.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ReplicaSettings
    ) -> None:
        setup_logs(settings.server.log_format)
        disable_progress_bar()
        self.name: str = serve.get_replica_context().replica_id.unique_id
        self._state = make_state(
            settings.model, settings.tokenizer, settings.engine, settings.server
        )
        started: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._app = create_app(self._state, on_started=started.set_result)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        error = await started
        if error is not None:
            await self._lifespan.__aexit__(None, None, None)
            raise error
        logger.info("replica %s is ready", self.name)

    async def answer(self, request: ReplicaRequest) -> AsyncIterator[Accepted | ReplyHead | bytes]:
        """An answer as it comes: who took it up, its head, its body."""
        yield Accepted(self.name)
        async for part in Exchange(self._app, request).parts():
            yield part

    async def answer_whole(self, request: ReplicaRequest) -> Reply:
        """An answer at once; for requests to all replicas."""
        head, chunks = ReplyHead(500, ()), []
        async for part in Exchange(self._app, request).parts():
            if isinstance(part, ReplyHead):
                head = part
            else:
                chunks.append(part)
        return Reply(self.name, head.status, head.headers, b"".join(chunks))

    async def describe(self) -> dict[str, Any]:
        """Who and where it is."""
        return {"replica": self.name, "pid": os.getpid(), "num_live": self._state.engine.num_live}

    async def check_health(self) -> None:
        """For Serve: raises when the engine computes no more, as ``/health`` tells it."""
        health = health_of(self._state)
        if health.status in _FAILED:
            reason = health.failure or f"it has been at one step for {health.loop_age_s} s"
            raise RuntimeError(f"the engine is {health.status}: {reason}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """For Serve, which brings it to the routers."""
        figures = self._figures()
        usage = round(figures["page_usage"] / USAGE_STEP) * USAGE_STEP
        return {
            "num_requests": int(figures["num_requests"]),
            "num_waiting": int(figures["num_waiting"]),
            "page_usage": usage,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve, which brings it to ``PagePolicy``."""
        return self._figures()

    async def __del__(self) -> None:
        """For Serve, once nothing runs here any more: give everything back."""
        if hasattr(self, "_lifespan"):
            await self._lifespan.__aexit__(None, None, None)

    def _figures(self) -> dict[str, float]:
        engine = self._state.engine
        snapshot = engine.snapshot
        if snapshot is None:
            return {"num_requests": 0.0, "num_waiting": 0.0, "page_usage": 0.0}
        capacity = max(1, snapshot.kv.capacity_bytes)
        waiting = max(
            snapshot.scheduler.num_waiting + snapshot.scheduler.num_swapped, engine.num_queued
        )
        return {
            "num_requests": float(engine.num_live),
            "num_waiting": float(waiting),
            "page_usage": min(1.0, snapshot.kv.committed_bytes / capacity),
        }

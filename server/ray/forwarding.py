"""Brings a request to a replica and its answer back, whatever happens to replicas meanwhile.

Owns: nothing.  Thread-safety: none; one event loop.

A replica that dies before its client saw a part of the answer loses nothing: another one answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from starlette.types import Send

from ..errors import ApiError
from .messages import Accepted, ReplicaRequest, ReplyHead
from .reply_writer import ReplyWriter

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Replicas that one request may lose."""

RETRY_SECONDS = 0.2
"""Before the next attempt: who died is known to be dead by then."""


class ReplicaLostError(Exception):
    """The replica ended, or does not answer.

    Attributes:
        replicas: names of those that it was sent to.
    """

    def __init__(self, reason: str, replicas: Iterable[str]) -> None:
        super().__init__(reason)
        self.replicas = frozenset(replicas)


class Forwarder:
    """A handle of the replicas, as the ingress uses it.

    Args:
        handle: Serve's handle of ``Replica``.
        route_timeout_s: most seconds until a replica takes up a request.
    """

    def __init__(self, handle: Any, route_timeout_s: float) -> None:
        self._answer = handle.options(method_name="answer", stream=True)
        self._route_timeout_s = route_timeout_s

    async def forward(self, request: ReplicaRequest, send: Send) -> None:
        """Send the client an answer. Cancelled, it has the replica abort."""
        writer = ReplyWriter(send, request.path)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            is_last = attempt == MAX_ATTEMPTS
            try:
                replica = await self._try(request, writer)
            except ReplicaLostError as error:
                names = ", ".join(sorted(error.replicas)) or "(none)"
                logger.warning("replica %s is lost: %s", names, error)
                if writer.has_started or is_last or not error.replicas:
                    await writer.fail(_lost(str(error), has_started=writer.has_started))
                    return
                gone = error.replicas
            else:
                # Who refused is not asked again: then all there are did.
                if not writer.is_refusal or replica in request.avoid or is_last:
                    await writer.finish()
                    return
                gone = frozenset({replica})
            writer.restart()
            request = replace(request, avoid=request.avoid | gone, routed=[])
            await asyncio.sleep(RETRY_SECONDS)

    async def _try(self, request: ReplicaRequest, writer: ReplyWriter) -> str:
        """One attempt; the name of who answered. Raises ``ReplicaLostError``."""
        parts = self._answer.remote(request)
        try:
            accepted = await asyncio.wait_for(anext(parts), self._route_timeout_s)
            assert isinstance(accepted, Accepted)
            async for part in parts:
                if isinstance(part, ReplyHead):
                    writer.add_head(part, accepted.replica)
                else:
                    await writer.add_body(part)
        except (TimeoutError, asyncio.TimeoutError) as error:
            reason = f"no replica took the request up within {self._route_timeout_s:g} s"
            raise ReplicaLostError(reason, request.routed) from error
        except (RayError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
                raise  # it lives, and has a bug
            raise ReplicaLostError(f"it ended ({type(error).__name__})", request.routed) from error
        finally:
            parts.cancel()
        return accepted.replica


def _lost(reason: str, *, has_started: bool) -> ApiError:
    if has_started:
        return ApiError(
            503, "the replica that wrote this answer ended before it did", code="replica_lost"
        )
    return ApiError(
        503, f"no replica answers: {reason}", code="no_replica", headers={"retry-after": "1"}
    )

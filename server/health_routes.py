"""Whether the server lives, and whether it takes requests: for probes of orchestrators.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from .. import __version__
from .generation import server_state
from .protocol.operations import Health, HealthStatus, Version
from .state import ServerState

router = APIRouter(tags=["operations"])

_UNHEALTHY = ("starting", "stuck", "stopped", "dead")


def health_of(state: ServerState) -> Health:
    """How the engine is now."""
    engine = state.engine
    status: HealthStatus = "ok" if engine.state == "running" else engine.state
    if status == "ok" and not state.is_started:
        status = "starting"
    loop_age_s = engine.loop_age_s
    if engine.state in ("running", "draining") and loop_age_s is not None:
        status = "stuck" if loop_age_s > state.config.health_timeout_s else status
    snapshot = engine.snapshot
    if status == "ok" and snapshot is not None and snapshot.is_asleep:
        status = "sleeping"
    return Health(
        status=status,
        state=engine.state,
        last_step_age_s=engine.last_step_age_s,
        loop_age_s=loop_age_s,
        startup_phase=engine.startup_phase,
        failure=engine.failure,
    )


@router.get("/health", responses={503: {"model": Health}})
async def health(request: Request, response: Response) -> Health:
    """200 while the engine can compute: also when it sleeps or drains. 503 while it loads, when it
    is dead, and when one step takes longer than ``--health-timeout``."""
    result = health_of(server_state(request))
    if result.status in _UNHEALTHY:
        response.status_code = 503
    return result


@router.get("/ready", responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """200 while requests are taken, else 503."""
    result = health_of(server_state(request))
    if result.status != "ok":
        response.status_code = 503
        response.headers["retry-after"] = "1"
    return result


@router.get("/version")
async def version() -> Version:
    """The version of vmalloc."""
    return Version(version=__version__)

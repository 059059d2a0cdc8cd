"""Puts the HTTP application together: middleware, error shapes, routes.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from . import (
    admin_routes,
    chat_routes,
    completion_routes,
    health_routes,
    metrics_routes,
    model_routes,
    page_map_routes,
    page_routes,
    response_routes,
    tokenization_routes,
)
from .access import AccessMiddleware
from .api_description import DescribedApp
from .auth import AuthMiddleware
from .body import BodyMiddleware
from .errors import FailureMiddleware, install_error_handlers
from .request_id import HEADER, RequestIdMiddleware
from .root_path import RootPathMiddleware
from .state import ServerState
from .stats_log import StatsLog

logger = logging.getLogger(__name__)


def create_app(
    state: ServerState, *, on_started: Callable[[BaseException | None], None] | None = None
) -> FastAPI:
    """The ASGI application of one served model.

    Its start-up starts the engine and does not wait for it: meanwhile ``/health`` answers.
    ``on_started`` is called once the engine is loaded, or with the exception that kept it from it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.engine.start()
        tasks = [asyncio.create_task(_finish_start(state, on_started))]
        if state.config.log_stats:
            tasks.append(asyncio.create_task(StatsLog(state.engine).run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await state.close()

    app = DescribedApp(
        title="vmalloc",
        version=__version__,
        description="An OpenAI-compatible endpoint whose KV cache is virtual memory.",
        lifespan=lifespan,
        redoc_url=None,
        # A path with a slash too many is unknown, not moved.
        redirect_slashes=False,
    )
    app.state.server = state
    install_error_handlers(app)
    for routes in (
        health_routes.router,
        metrics_routes.router,
        model_routes.router,
        completion_routes.router,
        chat_routes.router,
        response_routes.router,
        tokenization_routes.router,
        admin_routes.router,
        admin_routes.admin,
        page_map_routes.router,
        page_routes.router,
    ):
        app.include_router(routes)
    # The last one added is the outermost.
    app.add_middleware(FailureMiddleware)
    app.add_middleware(BodyMiddleware, config=state.config)
    app.add_middleware(AuthMiddleware, config=state.config)
    if state.config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(state.config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "retry-after"],
        )
    app.add_middleware(AccessMiddleware, state=state)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(RootPathMiddleware, root_path=state.config.root_path)
    return app


async def _finish_start(
    state: ServerState, on_started: Callable[[BaseException | None], None] | None
) -> None:
    try:
        await state.finish_start()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if on_started is not None:
            on_started(error)
        return
    if on_started is not None:
        on_started(None)

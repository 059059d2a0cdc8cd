"""An ASGI application behind a real socket, on a thread: for tests that reach into it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from vmalloc.engine import AsyncLLMEngine, load_engine
from vmalloc.server import ServerConfig, ServerState, create_app
from vmalloc.server.connection import MAX_HEAD_BYTES, Connection
from vmalloc.server.run import listen

DEADLINE_SECONDS = 60.0


def make_state(
    make_engine: Any = None, engine_settings: dict[str, Any] | None = None, **settings: Any
) -> ServerState:
    """What a server with these settings shares; its engine is not started yet."""
    config = ServerConfig(port=0, **settings)
    engine = AsyncLLMEngine(
        make_engine or (lambda phases: load_engine("demo", phases=phases)),
        max_queued_requests=config.max_queued_requests,
        **(engine_settings or {}),
    )
    return ServerState(engine, config, model="demo", created=1)


class AppThread:
    """The server of a state, with uvicorn's lifespan, until the block ends."""

    def __init__(self, state: ServerState, *, waits: bool = True) -> None:
        self.state = state
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._listener = listen(state.config)
        self.port = self._listener.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_SECONDS)
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(state, on_started=self._note_started),
                http=Connection,
                loop="asyncio",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_config=None,
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )
        self._waits = waits
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([self._listener])), daemon=True
        )

    def connect(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_SECONDS)

    def _note_started(self, error: BaseException | None) -> None:
        self._start_error = error
        self._started.set()

    def wait_started(self) -> None:
        """Wait for the engine."""
        assert self._started.wait(DEADLINE_SECONDS)
        assert self._start_error is None

    def __enter__(self) -> AppThread:
        self._thread.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if self._waits:
            self.wait_started()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(DEADLINE_SECONDS)
        self._listener.close()
        assert not self._thread.is_alive()

"""Runs a server process: listens, loads, serves, drains.

Owns: the listening socket and the process's signals.
Thread-safety: none; the main thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..engine import (
    AsyncLLMEngine,
    ConfigError,
    EngineConfig,
    LLMEngine,
    StartupPhase,
    StartupPhases,
    VmallocError,
    load_engine,
)
from .app import create_app
from .config import ServerConfig
from .connection import MAX_HEAD_BYTES, Connection
from .logs import setup_logs
from .state import ServerState

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

BACKLOG = 2048
FLUSH_SECONDS = 5
"""Time that answers which are ready get to reach their clients when the server ends."""

LOST_SECONDS = 1.0
"""Time in which a server that lost a rank still answers, that it did: to requests and to probes."""

END_SECONDS = 5.0
"""Time that the engine gets to end a step when the server is told to end at once."""


def serve(
    model: str,
    tokenizer: str | None,
    engine_config: EngineConfig,
    server_config: ServerConfig,
) -> int:
    """Serve a model until SIGTERM or SIGINT; the exit code.

    A first signal drains: new requests get 503, running ones end, up to ``shutdown_timeout_s``. A
    second one ends at once, with the exit code 1 as requests may be lost.

    Raises ``ConfigError`` where nothing can listen, and for a model or setting that cannot work.
    """
    setup_logs(server_config.log_format)
    listener = listen(server_config)
    state = make_state(model, tokenizer, engine_config, server_config)
    engine = state.engine
    server = DrainingServer(state)
    try:
        server.run([listener])
    finally:
        listener.close()
        if server_config.uds is not None:
            Path(server_config.uds).unlink(missing_ok=True)
    if isinstance(server.start_error, VmallocError):
        raise server.start_error
    is_clean = server.start_error is None and engine.failure is None and not state.is_hurried
    code = EXIT_OK if is_clean else EXIT_FAILED
    if not engine.end(END_SECONDS):
        # It loads or hangs in a step, and Python would take itself apart under it.
        logger.warning("the engine is in the middle of something; the process ends without it")
        logging.shutdown()
        os._exit(code)
    return code


def make_state(
    model: str,
    tokenizer: str | None,
    engine_config: EngineConfig,
    server_config: ServerConfig,
) -> ServerState:
    """What the application of a model stands on; the engine loads when the application starts.

    Raises ``ConfigError`` for a chat template that is none.
    """

    def load(phases: StartupPhases) -> LLMEngine:
        loaded = load_engine(model, tokenizer, engine_config, phases=phases)
        with phases.phase("prepare structured outputs"):
            loaded.prepare_structured_outputs()
        return loaded

    engine = AsyncLLMEngine(
        load,
        max_queued_requests=server_config.max_queued_requests,
        queue_timeout_s=server_config.queue_timeout_s,
        release_idle_after_s=server_config.release_idle_after_s,
        phases=StartupPhases(on_finished=_log_phase),
    )
    return ServerState(engine, server_config, model=model, created=int(time.time()))


class DrainingServer(uvicorn.Server):
    """A uvicorn server that answers 503 while it drains, and ends where its engine cannot go on.

    That is where it does not start, and where it lost a rank: nothing but a new start of all ranks
    mends that.

    Attributes:
        start_error: what kept the engine from starting, or None.
    """

    def __init__(self, state: ServerState) -> None:
        config = state.config
        super().__init__(
            uvicorn.Config(
                create_app(state, on_started=self._engine_started),
                log_config=None,
                access_log=False,
                ws="none",
                lifespan="on",
                server_header=False,
                backlog=BACKLOG,
                http=Connection,
                loop="asyncio",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                # Only for what ``_abort_connections`` did not end.
                timeout_graceful_shutdown=2 * FLUSH_SECONDS,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_repeats = 0
        self._is_ending = False
        self.start_error: BaseException | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second.

        Where nothing runs any more a second one changes nothing: it often is the first once more,
        sent to a whole process group. A third one is meant.
        """
        if self._loop is None or self._state.is_hurried:
            self.should_exit = self.force_exit = True
            return
        if self._state.is_draining:
            self._num_repeats += 1
            if self._num_repeats == 1 and self._state.engine.num_live == 0:
                return
            self._state.is_hurried = self.should_exit = True
            self._on_loop(self._hurry, sig)
            return
        self._state.is_draining = True
        self._on_loop(self._start_to_drain, sig)

    def _on_loop(self, function: Callable[[str], None], sig: int) -> None:
        """Call a function with the signal's name. It interrupted some request, and is none of its
        business: lines that it logs do not bear its id."""
        assert self._loop is not None
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(function, name, context=contextvars.Context())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for address in _addresses(self._state.config, sockets or []):
            logger.info("listening on %s", address)

    async def on_tick(self, counter: int) -> bool:
        if self._state.engine.is_rank_lost and not self._is_ending:
            self._is_ending = True
            assert self._loop is not None
            self._loop.call_later(LOST_SECONDS, setattr, self, "should_exit", True)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A client that never reads its answer does not keep the server.
        assert self._loop is not None
        self._loop.call_later(FLUSH_SECONDS, self._abort_connections)
        await super().shutdown(sockets)

    def _hurry(self, signal_name: str) -> None:
        engine = self._state.engine
        logger.warning("%s again: %d requests are given up", signal_name, engine.num_live)
        self._abort_connections()

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.abort()

    def _start_to_drain(self, signal_name: str) -> None:
        engine = self._state.engine
        timeout_s = self._state.config.shutdown_timeout_s
        logger.info(
            "%s: %d requests get up to %g seconds to end", signal_name, engine.num_live, timeout_s
        )
        self._drain = asyncio.ensure_future(self._run_drain(timeout_s))

    async def _run_drain(self, timeout_s: float) -> None:
        engine = self._state.engine
        if not await engine.drain(timeout_s):
            logger.warning("%d requests did not end in time; they are aborted", engine.num_live)
            await engine.close()
        self.should_exit = True

    def _engine_started(self, error: BaseException | None) -> None:
        if error is None:
            logger.info("ready")
            return
        self.start_error = error
        self.should_exit = True


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ``ConfigError`` that says who is there already."""
    if config.uds is not None:
        return _listen_unix(config.uds)
    try:
        # Without the protocol asyncio would not switch Nagle's algorithm off: 40 ms a token.
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"host is {config.host!r}; it has no address: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port is {config.port} on host {config.host!r}; it cannot be listened on: "
            f"{error.strerror}"
        ) from error
    return listener


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            _remove_stale_socket(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds is {path!r}; it cannot be listened on: {error}") from error
    return listener


def _remove_stale_socket(path: str) -> None:
    """Take away the socket of a server that was killed; one that is served stays."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError("a server listens there already")


def _addresses(config: ServerConfig, sockets: list[socket.socket]) -> list[str]:
    """Where people find the server."""
    if config.uds is not None:
        return [f"unix:{config.uds}"]
    scheme = "http" if config.ssl_certfile is None else "https"
    addresses: list[str] = []
    for one in sockets:
        name: Any = one.getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        addresses.append(f"{scheme}://{host}:{name[1]}{config.root_path}")
    return addresses


def _log_phase(phase: StartupPhase) -> None:
    logger.info("%s: %.2f s", phase.name, phase.seconds)

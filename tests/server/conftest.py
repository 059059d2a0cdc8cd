"""Servers for tests: one process that many share, and processes of one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.process import ServerProcess
from tests.server.running import SETTINGS, RunningServer
from vmalloc.engine import LLM

StartServer = Callable[..., ServerProcess]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """``start_server("--max-num-seqs", "4")``: a process that ends well with the test.

    It must exit with 0 at SIGTERM unless the test ended it, with no traceback in its log.
    """
    servers: list[ServerProcess] = []

    def start(*flags: str, **kwargs: object) -> ServerProcess:
        log_path = tmp_path / f"server-{len(servers)}.log"
        servers.append(ServerProcess(*flags, log_path=log_path, **kwargs))  # type: ignore[arg-type]
        return servers[-1]

    try:
        yield start
        for server in servers:
            if server.process.poll() is None:
                assert server.end() == 0, server.log
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="session")
def shared_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The process that tests share which leave a server as they found it."""
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    server = ServerProcess(
        *("--batch-invariant", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "67108864"),
        *("--admin-api-key", "admin-key", "--max-body-bytes", "4194304"),
        log_path=log_path,
        is_forked=False,
    )
    try:
        yield server
        server.wait_idle()
        assert server.end() == 0, server.log
    finally:
        server.kill()


@pytest.fixture
def shared_server(shared_process: ServerProcess) -> Iterator[ServerProcess]:
    """The shared process; each test leaves it idle, and able to write what it wrote before."""
    before = shared_process.text()
    yield shared_process
    shared_process.wait_idle()
    assert shared_process.text() == before


@pytest.fixture(scope="session")
def demo_server() -> Iterator[RunningServer]:
    """A server; at the end nothing may run in it."""
    running = RunningServer()
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture(scope="session")
def demo_llm() -> Iterator[LLM]:
    """The same model and settings without a server."""
    with LLM("demo", **SETTINGS) as offline:
        yield offline

"""What goes wrong in a server's process, before it starts: for ``ServerProcess(prepare=...)``."""

from __future__ import annotations

import socket
import time
from typing import Any

import vmalloc.server.run as run
from vmalloc.engine import LLMEngine, StartupPhases
from vmalloc.server import ServerConfig


def load_for_ever() -> None:
    """A model whose load takes ten minutes."""

    def load(*args: Any, phases: StartupPhases) -> LLMEngine:
        with phases.phase("load weights"):
            time.sleep(600)
        raise AssertionError("nobody waited so long")

    run.load_engine = load  # type: ignore[assignment]


def fail_every_step() -> None:
    """A device that is broken."""

    def step(self: LLMEngine) -> Any:
        raise MemoryError("injected")

    LLMEngine.step = step  # type: ignore[method-assign]


def small_send_buffers() -> None:
    """Connections whose kernel takes little, so that a client who does not read is felt at once."""
    listen = run.listen

    def listen_small(config: ServerConfig) -> socket.socket:
        listener = listen(config)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    run.listen = listen_small

"""One server of the demo model for all tests, and the same engine offline.

Tests that use them say ``pytest_plugins = ["tests.server.fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import SETTINGS, RunningServer
from vmalloc.engine import LLM


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

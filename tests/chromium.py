"""A real Chromium for pages, where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def absence() -> str | None:
    """Why there is no browser to test with, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if CHROMIUM.exists() else f"Chromium is not at {CHROMIUM}"


@contextmanager
def launched_chromium() -> Iterator[Any]:
    """A browser; skips the test where there is none, unless one is required."""
    reason = absence()
    if reason is not None:
        if os.environ.get("VMALLOC_REQUIRE_BROWSER") == "1":
            pytest.fail(f"VMALLOC_REQUIRE_BROWSER is 1, but {reason}")
        pytest.skip(f"{reason}; pages are tested in Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield launched
        launched.close()

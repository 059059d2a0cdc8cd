"""The progress bar of ``vmalloc bench``, on stderr where that is a terminal.

Owns: one rich progress display.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .bench_result import RequestResult


class BenchProgress:
    """Counts answers, tokens and failures as they come."""

    def __init__(self, num_requests: int) -> None:
        self._progress = Progress(
            TextColumn("Sending"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[red]{task.fields[failed]}[/red]"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=num_requests, rate="", failed="")
        self._started: float | None = None
        self._num_tokens = 0
        self._num_failed = 0

    def add(self, result: RequestResult) -> None:
        """One more ended."""
        now = time.monotonic()
        if self._started is None:
            self._started = now - (result.e2el_s or 0.0)
        self._num_tokens += result.num_output_tokens
        self._num_failed += result.failure is not None
        rate = self._num_tokens / max(now - self._started, 1e-9)
        failed = f"{self._num_failed} failed" if self._num_failed else ""
        self._progress.update(self._task, advance=1, rate=f"{rate:,.0f} tok/s", failed=failed)

    def __enter__(self) -> BenchProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.stop()

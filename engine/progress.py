"""Progress bars on stderr: of ``LLM.generate``, and of what an engine does before its first step.

Owns: one rich progress display.  Thread-safety: none; it starts no thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .outputs import RequestOutput

REFRESH_SECONDS = 0.1


def watch_start_up(what: str, sizes: Sequence[int]) -> Iterator[int]:
    """Go over batch sizes, with a bar on a terminal."""
    with Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        auto_refresh=False,
    ) as progress:
        task = progress.add_task("", total=len(sizes), size="")
        for size in sizes:
            progress.update(task, size=f"batch of {size}", refresh=True)
            yield size
            progress.update(task, advance=1, refresh=True)


class GenerationProgress:
    """Counts finished prompts, and tokens per second of finished and streamed requests."""

    def __init__(self, num_prompts: int, *, is_shown: bool) -> None:
        self._num_tokens = 0
        self._progress: Progress | None = None
        if is_shown:
            self._progress = Progress(
                TextColumn("Generating"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=num_prompts, rate="")
        self._started = self._drawn = time.monotonic()

    def update(self, output: RequestOutput) -> None:
        """Count an output of a step."""
        if self._progress is None:
            return
        self._num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        if output.is_finished:
            self._progress.advance(self._task)
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._draw(now)

    def __enter__(self) -> GenerationProgress:
        if self._progress is not None:
            self._progress.start()
        self._started = self._drawn = time.monotonic()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._draw(time.monotonic())
            self._progress.stop()

    def _draw(self, now: float) -> None:
        assert self._progress is not None
        rate = self._num_tokens / max(now - self._started, 1e-9)
        self._progress.update(self._task, rate=f"{rate:,.0f} tok/s")
        self._progress.refresh()
        self._drawn = now

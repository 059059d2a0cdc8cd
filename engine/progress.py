"""The progress bar of ``LLM.generate``, on stderr.

Owns: one rich progress display.  Thread-safety: none; it starts no thread.
"""

from __future__ import annotations

import time
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

"""What an engine does before its first step, by name and time.

Owns: the list of finished phases.
Thread-safety: one thread runs the phases; others may read ``finished`` and ``current`` meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StartupPhase:
    """One finished phase.

    Attributes:
        name: e.g. ``"load weights"``.
        seconds: wall time.
    """

    name: str
    seconds: float


class StartupPhases:
    """Times the phases of a start.

    Args:
        on_finished: called with each phase when it ends, on the thread that ran it.
        on_started: called with the name of each phase when it starts.
    """

    def __init__(
        self,
        on_finished: Callable[[StartupPhase], None] | None = None,
        on_started: Callable[[str], None] | None = None,
    ) -> None:
        self._on_finished = on_finished
        self._on_started = on_started
        self.finished: list[StartupPhase] = []
        self.current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; one that raises is not counted as finished."""
        self.current = name
        if self._on_started is not None:
            self._on_started(name)
        started = time.perf_counter()
        yield
        finished = StartupPhase(name, time.perf_counter() - started)
        self.current = None
        self.finished.append(finished)
        if self._on_finished is not None:
            self._on_finished(finished)

    @property
    def seconds(self) -> float:
        """Time of all finished phases together."""
        return sum(phase.seconds for phase in self.finished)

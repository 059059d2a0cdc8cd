"""Feeds a trace to an engine: whatever has arrived by a step's start is queued before it.

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .clock import SimulatedClock
from .engine import Served, SimulatedEngine, Step
from .trace import Trace


def replay(trace: Trace, engine: Served, clock: SimulatedClock) -> Iterator[int]:
    """Serve every request of ``trace``; after each step, how many have arrived."""
    door = _Door(trace, engine, clock)
    while door.is_open or engine.has_unfinished:
        door.let_in()
        engine.step()
        yield door.num_arrived


def simulate(
    trace: Trace, engine: SimulatedEngine, clock: SimulatedClock, *, skips: bool = True
) -> Iterator[Step]:
    """Serve every request of ``trace``, step by step.

    Args:
        skips: do steps at once that differ by lengths alone.
    """
    door = _Door(trace, engine, clock)
    while door.is_open or engine.has_unfinished:
        door.let_in()
        yield engine.step()
        if skips and (skipped := engine.try_skip(door.next_arrival_s)) is not None:
            yield skipped


class _Door:
    """Lets requests in as their time comes."""

    def __init__(self, trace: Trace, engine: Served, clock: SimulatedClock) -> None:
        self._trace, self._engine, self._clock = trace, engine, clock
        self._arrivals = trace.arrival_s.tolist()
        self._outputs = trace.output_tokens.tolist()
        self.num_arrived = 0

    @property
    def is_open(self) -> bool:
        """Whether more will come."""
        return self.num_arrived < len(self._arrivals)

    @property
    def next_arrival_s(self) -> float:
        """When the next one comes."""
        return self._arrivals[self.num_arrived] if self.is_open else math.inf

    def let_in(self) -> None:
        """Whoever has arrived; if nobody is being served, wait for the next."""
        if not self._engine.has_unfinished:
            self._clock.wait_until(self.next_arrival_s)
        now = self._clock()
        while self.next_arrival_s <= now:
            idx = self.num_arrived
            self._engine.add(idx, self._trace.prompt(idx), self._outputs[idx], self._trace.width)
            self.num_arrived += 1

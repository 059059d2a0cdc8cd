"""Feeds a trace to an engine: whatever has arrived by a step's start is queued before it.

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from .clock import SimulatedClock
from .engine import Served
from .trace import Trace


def replay(trace: Trace, engine: Served, clock: SimulatedClock) -> Iterator[int]:
    """Serve every request of ``trace``; after each step, how many have arrived."""
    arrivals = trace.arrival_s.tolist()
    outputs = trace.output_tokens.tolist()
    num_arrived = 0
    while num_arrived < len(arrivals) or engine.has_unfinished:
        if not engine.has_unfinished:
            clock.wait_until(arrivals[num_arrived])
        now = clock()
        while num_arrived < len(arrivals) and arrivals[num_arrived] <= now:
            engine.add(num_arrived, trace.prompt(num_arrived), outputs[num_arrived], trace.width)
            num_arrived += 1
        engine.step()
        yield num_arrived

"""Runs one setting over one trace.

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .measurements import Measurements
from .replay import simulate
from .setting import Setting
from .trace import Trace

TICK_STEPS = 256
"""Steps between two words of progress."""


def run(
    setting: Setting,
    trace: Trace,
    tick: Callable[[int], None] = lambda num_ended: None,
    *,
    keeps_points: bool = False,
) -> dict[str, Any]:
    """Simulate every request of ``trace``; plain values.

    ``tick`` is told now and then how many requests have ended.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with setting.engine(trace.max_seq_len) as (engine, clock):
        measurements = Measurements(trace, engine)
        for idx, step in enumerate(simulate(trace, engine, clock)):
            measurements.add(step, clock())
            if idx % TICK_STEPS == 0:
                tick(measurements.num_ended)
        tick(measurements.num_ended)
        result = measurements.result()
    if keeps_points:
        result["points"] = measurements.points
    cpu_s = time.process_time() - cpu_started
    return {
        "setting": setting.describe(),
        "trace": {"name": trace.name, "num_requests": len(trace), "width": trace.width},
        **_rounded(result),
        "wall_s": round(time.perf_counter() - started, 3),
        "cpu_s": round(cpu_s, 3),
        "requests_per_cpu_s": round(len(trace) / cpu_s, 1),
    }


def _rounded(value: Any) -> Any:
    """Six digits of every number that is no count."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

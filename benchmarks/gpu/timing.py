"""Times of calls on the host and on the GPU, as medians with their spread.

Contenders of one comparison take turns, each round in the other direction, so that drift of clocks
and temperature hits all of them alike.

torch is imported by what needs it: sections that only start others do without.

Owns: nothing.  Thread-safety: functions without shared state; GPU work goes to the current stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

FILLER_BYTES = 256 << 20
Call = Callable[[], Any]


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """``{median, p10, p90, min, max, n}`` of at least one value, rounded."""
    low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), [10, 50, 90])
    return {
        "median": round(float(middle), digits),
        "p10": round(float(low), digits),
        "p90": round(float(high), digits),
        "min": round(float(min(values)), digits),
        "max": round(float(max(values)), digits),
        "n": len(values),
    }


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """``{p50, p90, p99, max, mean, n}``: for what is about tails."""
    middle, high, higher = np.percentile(np.asarray(values, dtype=np.float64), [50, 90, 99])
    return {
        "p50": round(float(middle), digits),
        "p90": round(float(high), digits),
        "p99": round(float(higher), digits),
        "max": round(float(max(values)), digits),
        "mean": round(float(np.mean(values)), digits),
        "n": len(values),
    }


def timed(times: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, append the microseconds that it took on the host's clock, and return its value."""
    start = time.perf_counter_ns()
    value = call(*arguments)
    times.append((time.perf_counter_ns() - start) / 1e3)
    return value


def compare_us(
    calls: dict[str, Call], *, device: str, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Microseconds of every call in every round: by events on a GPU, else on the host's clock."""
    names = list(calls)
    for name in names:
        for _ in range(warmup):
            calls[name]()
    if device == "cpu":
        times: dict[str, list[float]] = {name: [] for name in names}
        for index in range(rounds):
            for name in names if index % 2 == 0 else reversed(names):
                timed(times[name], calls[name])
        return times
    import torch

    torch.cuda.synchronize()
    # Cleared before each sample: it empties the L2 cache, and by the time that it is done the host
    # has enqueued the call, so that launching it is no part of the sample.
    filler = torch.empty(FILLER_BYTES, dtype=torch.uint8, device="cuda")
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            filler.zero_()
            begin.record()
            calls[name]()
            end.record()
            marks[name].append((begin, end))
        # One round in flight at most: a full launch queue would time the host.
        torch.cuda.synchronize()
    return {
        name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
        for name, pairs in marks.items()
    }


def measure_copy(device: str) -> dict[str, float]:
    """GB/s of a large copy on the device, read plus written: what others are held against."""
    import torch

    num_bytes = 1 << (20 if device == "cpu" else 33)
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    times = compare_us({"copy": copy}, device=device, rounds=8)["copy"]
    del source, target, copy
    if device != "cpu":
        torch.cuda.empty_cache()  # KV pages come from the driver, past torch's allocator
    return spread([2 * num_bytes / us / 1e3 for us in times], 1)


def capture(call: Call, *, device: str) -> Call:
    """A CUDA graph of ``call``, as the call that replays it; on CPU ``call`` itself.

    Raises whatever the capture raises.
    """
    if device == "cpu":
        return call
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: a cache's worker may call the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


class Load:
    """Keeps a GPU busy from the outside: large matrix products on a stream of its own.

    Args:
        depth: products in flight after ``keep``; each takes about 10 ms of an H200.
        size: their edge.
    """

    def __init__(self, depth: int = 4, size: int = 16384) -> None:
        import torch

        self._stream = torch.cuda.Stream()
        self._depth = depth
        self._left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        self._out = torch.empty_like(self._left)
        self._events: list[torch.cuda.Event] = []

    def keep(self) -> None:
        """Top up what is in flight."""
        import torch

        self._events = [event for event in self._events if not event.query()]
        while len(self._events) < self._depth:
            with torch.cuda.stream(self._stream):
                torch.mm(self._left, self._left, out=self._out)
                event = torch.cuda.Event()
                event.record(self._stream)
            self._events.append(event)

    def is_busy(self) -> bool:
        """Whether some of it is still to be computed."""
        return bool(self._events) and not self._events[-1].query()

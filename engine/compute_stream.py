"""The stream that an engine's work is enqueued on, and how long its steps took there.

On the CPU everything is done when its call returns, and both are trivial.

Owns: on a GPU one stream.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class ComputeStream:
    """Where an engine's steps run, one after another.

    On a GPU this is a stream of the engine's own: the legacy default stream would wait for, and
    hold up, whatever else the process runs there. What was enqueued on the caller's stream before,
    such as the copies of the weights, comes first. Nothing that is still being computed leaves the
    engine, so no caller need wait for it. Not yet run on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        if device.type == "cuda":
            cuda: Any = torch.cuda
            self._stream = cuda.Stream(device)
            self._stream.wait_stream(cuda.current_stream(device))

    def use(self) -> AbstractContextManager[Any]:
        """Make it, and its device, current for a block."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        if self._stream is not None:
            self._stream.synchronize()


def current_stream_handle(device: torch.device) -> int | None:
    """The driver's handle of torch's current stream, None where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


class StepTimer:
    """Times stretches of work on a device without waiting for it.

    On a GPU a clock around a launch measures nothing: events before and after the work are read
    once the stream is past both, usually a step later. Not yet run on a GPU.

    Args:
        clock: seconds, for work on the CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._has_events = device.type == "cuda"
        self._started: Any = None
        self._pending: deque[tuple[int, Any, Any]] = deque()

    def start(self) -> None:
        """The work starts here."""
        self._started = self._now()

    def stop(self, num_tokens: int) -> None:
        """It ends here, and was for ``num_tokens``."""
        self._pending.append((num_tokens, self._started, self._now()))

    def take_finished(self) -> list[tuple[int, float]]:
        """Tokens and seconds of what ended, each once."""
        finished = []
        while self._pending:
            num_tokens, start, end = self._pending[0]
            if self._has_events:
                if not end.query():
                    break
                seconds = start.elapsed_time(end) / 1e3
            else:
                seconds = end - start
            finished.append((num_tokens, seconds))
            self._pending.popleft()
        return finished

    def _now(self) -> Any:
        if not self._has_events:
            return self._clock()
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

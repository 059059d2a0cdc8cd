"""One worker's KV allocation: reserved whole, and backed as the scheduler's plans say.

Owns: the reservation, and the timer that empties it.  Thread-safety: all methods; one mutex. The
timer's thread works only while no step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...device import current_stream
from ...elastic import elastic_tensor
from ...errors import ConfigError
from .extents import Extents
from .options import ElasticOptions
from .plan import MemoryPlan, RefusedOutput, refused

Agree = Callable[[int], int]
"""The least of the numbers that all workers name; the number itself where there is one worker."""

HAS_ALL = (1 << 31) - 1
"""Named by a worker that could follow a plan; others name the extents that they hold."""

SPARE_BYTES = 128 << 20
"""On CUDA, where creating a page is the slow part: what stays created between steps."""


class KVMemory:
    """The bytes that vLLM asks for when it allocates its KV cache.

    Raises:
        ConfigError: the page size does not suit the device, or there is no virtual memory on it.
    """

    def __init__(
        self, extents: Extents, device: torch.device, options: ElasticOptions, agree: Agree
    ) -> None:
        self._extents = extents
        self._options = options
        self._agree = agree
        self._device = device
        self._elastic = elastic_tensor(
            (extents.num_bytes,),
            torch.int8,
            device,
            page_bytes=extents.page_bytes,
            capacity_bytes=options.capacity_bytes,
            spare_bytes=0 if device.type == "cpu" else SPARE_BYTES,
        )
        self._lock = Lock()
        self._held: set[int] = set()
        self._peak_bytes = 0
        self._num_refusals = 0
        self._is_dropped = False  # since the last plan, by the timer or by sleep
        self._was_idle = True
        self._timer: Timer | None = None
        self._stream = 0
        if not self._try_commit([0]):
            raise ConfigError(
                f"capacity_bytes is {self._elastic.capacity_bytes}; it must hold the first extent, "
                f"{extents.max_extent_pages} pages of {extents.page_bytes} bytes"
            )

    @property
    def num_held(self) -> int:
        """Extents that have memory."""
        return len(self._held)

    @contextmanager
    def instead_of_zeros(self) -> Iterator[None]:
        """Within, the one ``torch.zeros`` of this size and type gives the reservation.

        That is how vLLM allocates its KV cache; it offers a context around the allocation for other
        memory pools.

        Raises:
            ConfigError: it allocated something else.
        """
        mode = _ZerosFrom(self._elastic.tensor)
        with mode:
            yield
        if mode.num_taken != 1:
            raise ConfigError(
                f"vLLM took its KV cache of {self._extents.num_bytes} bytes {mode.num_taken} times "
                "from the reservation; it must be once. Please report the model"
            )

    def apply(self, plan: MemoryPlan) -> RefusedOutput | None:
        """Make memory what the plan says before its step runs; None, or why it must not run.

        A refused plan changes nothing for good: the next complete one sets everything right.
        """
        with self._lock:
            self._stop_timer()
            self._stream = current_stream(self._device)
            if plan.num_refusals_seen != self._num_refusals:
                return refused(self._num_refusals, 0)  # scheduled before the refusal was known
            is_asked = plan.is_complete or plan.commit or self._was_idle
            is_lost = self._is_dropped and not plan.is_complete
            failed = is_lost or not self._follow(plan)
            self._is_dropped = False
            self._was_idle = plan.is_idle
            if is_asked:  # the same on every worker, as plans are
                own = HAS_ALL if not failed else 0 if is_lost else len(self._held)
                least = self._agree(own)
                if least != HAS_ALL:
                    self._num_refusals += 1
                    return refused(self._num_refusals, least)
            if plan.is_idle:
                self._start_timer()
            return None

    def commit_blocks(self, block_ids: Iterable[int]) -> None:
        """Back blocks for a step that has no plan; the first plan drops what it does not name.

        Raises:
            ConfigError: there is no memory for them.
        """
        extents = {self._extents.extent_of(block_id) for block_id in block_ids}
        with self._lock:
            if not self._try_commit(sorted(extents - self._held)):
                raise ConfigError(
                    f"{len(extents)} extents are needed to warm up; there is memory for "
                    f"{len(self._held)}"
                )

    def drop(self) -> None:
        """Give everything back but the null block's extent. Requires: no step needs it."""
        with self._lock:
            self._stop_timer()
            self._was_idle = True
            self._drop()

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap; the scheduler learns of it when a step finds too little.

        Raises:
            ConfigError: it is more than the scheduler ever counts on.
        """
        most = self._options.capacity_bytes
        if most is not None and capacity_bytes > most:
            raise ConfigError(
                f"capacity_bytes is {capacity_bytes}; vLLM was started with {most}, which the "
                "scheduler does not exceed"
            )
        self._elastic.resize(capacity_bytes)

    def stats(self) -> dict[str, int]:
        """Bytes reserved, committed now and at most so far, and taken from the system."""
        with self._lock:
            return {
                "reserved_bytes": self._elastic.reserved_bytes,
                "capacity_bytes": self._elastic.capacity_bytes,
                "committed_bytes": self._elastic.committed_bytes,
                "peak_committed_bytes": self._peak_bytes,
                "created_bytes": self._elastic.created_bytes,
                "held_extents": len(self._held),
                "num_extents": self._extents.num_extents,
                "refused_steps": self._num_refusals,
            }

    def close(self) -> None:
        with self._lock:
            self._stop_timer()
            self._elastic.close()

    def _follow(self, plan: MemoryPlan) -> bool:
        gone = self._held - set(plan.commit) if plan.is_complete else self._held & {*plan.decommit}
        self._decommit(gone)
        missing = [extent for extent in plan.commit if extent not in self._held]
        if self._try_commit(missing):
            return True
        # How many there is memory for is what the scheduler needs to know; the complete plan that
        # it sends next says which.
        for extent in missing:
            if not self._try_commit([extent]):
                break
        return False

    def _try_commit(self, extents: list[int]) -> bool:
        if not extents:
            return True
        if not self._elastic.commit(*self._extents.byte_ranges(extents)):
            return False
        self._held.update(extents)
        self._peak_bytes = max(self._peak_bytes, self._elastic.committed_bytes)
        return True

    def _decommit(self, extents: set[int]) -> None:
        if not extents:
            return
        # Neighbours may share their edge page: the core keeps it for as long as either needs it.
        self._elastic.decommit(*self._extents.byte_ranges(extents), stream=self._stream)
        self._held -= extents

    def _drop(self) -> None:
        self._decommit(self._held - {0})
        self._elastic.trim()
        self._is_dropped = True

    def _start_timer(self) -> None:
        if self._options.idle_s is None:
            return
        timer = Timer(self._options.idle_s, lambda: self._drop_if_current(timer))
        timer.daemon = True
        self._timer = timer
        timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop_if_current(self, timer: Timer) -> None:
        with self._lock:
            if self._timer is timer:  # else a step came first
                self._timer = None
                self._drop()


class _ZerosFrom(TorchFunctionMode):
    """Hands out ``buffer`` where ``torch.zeros`` is asked for just that."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self._buffer = buffer
        self.num_taken = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = (self._buffer.numel(),)
        if func is torch.zeros and args == wanted and kwargs.get("dtype") is torch.int8:
            self.num_taken += 1
            return self._buffer
        return func(*args, **kwargs)

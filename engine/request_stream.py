"""What comes back of one submitted request, as it comes.

Owns: outputs that nobody has read yet, and the request's timers.
Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

from .errors import RequestTimeoutError
from .outputs import RequestOutput


class RequestStream:
    """Outputs of the prompts that were submitted together, in the order the engine made them.

    Iterate over it for ``(prompt_idx, RequestOutput)``. Leave it (``async with``) and whatever has
    not ended is aborted. What ends it early is raised once everything before it was read:
    ``RequestTimeoutError``, ``RequestAbortedError``, ``EngineUnavailableError``.

    Attributes:
        request_id: the caller's name.
        names: the engine's name of each prompt's request.
        num_unstarted: prompts that no step has taken up yet.
    """

    def __init__(
        self,
        request_id: str,
        names: Sequence[str],
        on_abort: Callable[[RequestStream], None],
    ) -> None:
        self.request_id = request_id
        self.names = list(names)
        self.num_unstarted = len(names)
        self._num_unfinished = len(names)
        self._on_abort = on_abort
        self._unread: list[tuple[int, RequestOutput]] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def is_ended(self) -> bool:
        """Whether the engine has nothing more to say about it; some may be unread."""
        return self._num_unfinished == 0 or self._error is not None

    @property
    def is_read(self) -> bool:
        """Whether everything was read, and nothing more comes."""
        return self._num_unfinished == 0 and not self._unread and self._error is None

    async def next_outputs(
        self, timeout_s: float | None = None
    ) -> Sequence[tuple[int, RequestOutput]]:
        """Everything that came since the last call, as ``(prompt_idx, output)``; waits for some.

        Empty after ``timeout_s`` without any, and once everything was read.
        """
        if not self._unread and not self.is_ended:
            await self._wait_for_news(timeout_s)
        self._news.clear()
        if self._unread:
            outputs, self._unread = self._unread, []
            return outputs
        if self._error is not None:
            raise self._error
        return ()

    async def _wait_for_news(self, timeout_s: float | None) -> None:
        # Once per token. ``asyncio.wait_for`` makes a task each time, and before Python 3.12 it
        # loses a cancellation that comes together with the news: a client that leaves.
        timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._news.set)
        try:
            await self._news.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        while not self.is_read:
            for item in await self.next_outputs():
                yield item

    def abort(self) -> None:
        """End what has not ended, at the engine's next step boundary. Idempotent."""
        self._stop_timers()
        if not self.is_ended:
            self._num_unfinished = 0
            self._on_abort(self)
            self._news.set()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()

    def limit_time(self, kind: str, seconds: float | None) -> None:
        """Abort it after that time: ``"request"`` until it ends, ``"queue"`` until it starts."""
        if seconds is not None and not self.is_ended:
            loop = asyncio.get_running_loop()
            self._timers[kind] = loop.call_later(
                seconds, lambda: self.fail(RequestTimeoutError(kind, seconds))
            )

    def note_started(self) -> None:
        """One more prompt is being computed."""
        self.num_unstarted -= 1
        if self.num_unstarted == 0 and (timer := self._timers.pop("queue", None)) is not None:
            timer.cancel()

    def put(self, prompt_idx: int, output: RequestOutput) -> None:
        """Take an output from the engine."""
        if self.is_ended:
            return
        self._unread.append((prompt_idx, output))
        if output.is_finished:
            self._num_unfinished -= 1
            if self._num_unfinished == 0:
                self._stop_timers()
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End it with an error; whatever runs of it is aborted."""
        if self.is_ended:
            return
        self.abort()
        self._error = error

    def _stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

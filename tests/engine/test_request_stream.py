"""A stream of one request: its reader can be cancelled at any moment, and waits as told.

Whole engines are in test_async_engine.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from vmalloc.engine import RequestAbortedError, RequestStream

WAIT_SECONDS = 30.0


def make_stream(on_abort: Callable[[RequestStream], None] = lambda stream: None) -> RequestStream:
    return RequestStream("request", ["request-0"], on_abort)


@pytest.mark.parametrize("timeout_s", [None, WAIT_SECONDS])
@pytest.mark.parametrize("num_turns", range(5))
def test_a_reader_that_is_cancelled_just_as_something_comes_is_cancelled(
    num_turns: int, timeout_s: float | None
) -> None:
    """A client that leaves at the moment of a token would else be read for to the end."""

    async def work() -> None:
        stream = make_stream()
        reader = asyncio.create_task(stream.next_outputs(timeout_s))
        for _ in range(3):
            await asyncio.sleep(0)
        stream.fail(RequestAbortedError("gone"))  # wakes the reader as an output does
        for _ in range(num_turns):
            await asyncio.sleep(0)
        is_cancelled = reader.cancel()
        await asyncio.wait({reader})
        assert reader.cancelled() == is_cancelled
        if not is_cancelled:
            assert isinstance(reader.exception(), RequestAbortedError)

    asyncio.run(work())


def test_a_wait_ends_in_time_and_the_next_one_is_a_wait_again() -> None:
    async def work() -> None:
        stream = make_stream()
        assert await stream.next_outputs(0.01) == ()
        reader = asyncio.create_task(stream.next_outputs(WAIT_SECONDS))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not reader.done()
        stream.fail(RequestAbortedError("gone"))
        with pytest.raises(RequestAbortedError, match="gone"):
            await reader

    asyncio.run(work())

"""From an HTTP request to the engine and back, for every endpoint that generates.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine import ConfigError, EngineRequest, RequestOutput, RequestStream
from .disconnect import ClientDisconnectedError, run_while_connected
from .errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error, output_error, renamed_error
from .logs import log_prompts
from .request_id import request_id_var
from .request_record import RequestRecord
from .sse import HEADERS, KEEP_ALIVE
from .state import ServerState

FIRST_EVENT_SECONDS = 5.0
"""A stream's headers wait so long for its first output, so that a request which fails soon, or is
never started, gets a status that says so."""

_SAME_NAMES: Mapping[str, str] = MappingProxyType({})


def server_state(request: Request) -> ServerState:
    """What all handlers share."""
    state: ServerState = request.app.state.server
    return state


def new_id(prefix: str) -> str:
    """A name that no other response has, e.g. ``"cmpl-..."``."""
    return f"{prefix}-{uuid.uuid4().hex}"


class StreamEncoder(Protocol):
    """Turns outputs into the events of one endpoint."""

    def start(self) -> Iterable[bytes]:
        """Events before the first output."""
        ...

    def add(self, prompt_idx: int, output: RequestOutput) -> Iterable[bytes]:
        """Events of one output: what is new of it (``RequestOutputKind.DELTA``)."""
        ...

    def finish(self) -> Iterable[bytes]:
        """Events after the last output, the end marker included."""
        ...

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """Events of an error, the end marker included."""
        ...


@asynccontextmanager
async def submitted(
    request: Request,
    request_id: str,
    requests: Sequence[EngineRequest],
    field_names: Mapping[str, str],
) -> AsyncIterator[RequestStream]:
    """Submit prompts; whatever has not ended on leaving is aborted.

    ``field_names``: what the request calls settings that have another name in the engine.
    """
    state = server_state(request)
    # The name that its response's header bears: the client's, or one that was made for it.
    names = (request_id, request_id_var.get())
    record = RequestRecord.of(request)
    try:
        stream = await state.engine.submit(
            request_id, requests, timeout_s=state.config.request_timeout_s
        )
    except Exception as error:
        record.reject(error)
        if isinstance(error, ConfigError):
            raise renamed_error(error, field_names) from error
        raise
    record.accept(request_id, requests)
    if state.config.log_requests:
        log_prompts(request_id, requests)
    state.add_stream(stream, *names)
    ended_by: BaseException | None = None
    try:
        async with stream:
            yield stream
    except BaseException as error:
        ended_by = error
        raise
    finally:
        record.end(ended_by)
        state.remove_stream(stream, *names)


def check_output(output: RequestOutput) -> None:
    """Raise ``ApiError`` for an output that ended with an error."""
    if output.error is not None:
        raise output_error(output.error, output.error_kind)


async def generate(
    request: Request,
    request_id: str,
    requests: Sequence[EngineRequest],
    field_names: Mapping[str, str] = _SAME_NAMES,
) -> list[RequestOutput]:
    """The final output of every prompt, for params with ``RequestOutputKind.FINAL_ONLY``.

    Raises ``ApiError``, the engine's errors, and ``ClientDisconnectedError``.
    """

    async def work() -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        record = RequestRecord.of(request)
        async with submitted(request, request_id, requests, field_names) as stream:
            async for prompt_idx, output in stream:
                record.add(prompt_idx, output)
                check_output(output)
                outputs[prompt_idx] = output
        return [outputs[idx] for idx in range(len(requests))]

    return await run_while_connected(request.receive, work())


class EventStream(Response):
    """A response that sends a request's outputs as they come.

    The status waits for the first output, up to ``FIRST_EVENT_SECONDS``; what goes wrong before
    that is an ordinary error response, what goes wrong later an event. Generation ends with the
    client.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        request_id: str,
        requests: Sequence[EngineRequest],
        encoder: StreamEncoder,
        field_names: Mapping[str, str] = _SAME_NAMES,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._request_id = request_id
        self._requests = requests
        self._encoder = encoder
        self._field_names = field_names
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._run(send))
        except ClientDisconnectedError:
            if not self._has_started:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        except Exception as error:
            failure = as_api_error(error)
            if not self._has_started:
                await failure.response()(scope, receive, send)
                return
            await self._send(send, self._encoder.fail(failure))
            await self._end(send)

    async def _run(self, send: Send) -> None:
        keep_alive_s = server_state(self._request).config.sse_keep_alive_s or None
        async with submitted(
            self._request, self._request_id, self._requests, self._field_names
        ) as stream:
            record = RequestRecord.of(self._request)
            outputs = await stream.next_outputs(FIRST_EVENT_SECONDS)
            record.add_all(outputs)
            for _, output in outputs:
                check_output(output)
            await self._start(send)
            while True:
                events: list[bytes] = []
                for prompt_idx, output in outputs:
                    events.extend(self._encoder.add(prompt_idx, output))
                    if output.error is not None:
                        await self._send(send, events)
                        check_output(output)
                await self._send(send, events)
                if stream.is_read:
                    break
                outputs = await stream.next_outputs(keep_alive_s)
                record.add_all(outputs)
                if not outputs and not stream.is_read:
                    await self._send(send, [KEEP_ALIVE])
        await self._send(send, self._encoder.finish())
        await self._end(send)

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        self._has_started = True
        await self._send(send, self._encoder.start())

    async def _send(self, send: Send, events: Iterable[bytes]) -> None:
        body = b"".join(events)
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"", "more_body": False})

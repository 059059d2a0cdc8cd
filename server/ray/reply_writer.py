"""Sends a client the answer of a replica, and knows until when another replica may take over.

Owns: what is held back of one answer.  Thread-safety: none; one event loop.

Answers that are no event stream are held back until they are whole. Of an event stream comments
are sent, which keep a connection alive, and the rest from the first event on: from then on it has
*started*, and nobody can take over.
"""

from __future__ import annotations

import json

from starlette.datastructures import Headers as HeaderReader
from starlette.types import Send

from ..errors import ApiError
from ..request_id import HEADER
from ..sse import DONE, event
from .messages import Headers, ReplyHead

REPLICA_HEADER = b"x-vmalloc-replica"

_REFUSALS = frozenset(
    {
        "queue_full",
        *(f"engine_{state}" for state in ("starting", "sleeping", "draining", "stopped", "dead")),
    }
)
"""What one replica refuses another one may take."""


class ReplyWriter:
    """The one answer that a client gets, whoever wrote it.

    Args:
        send: where it goes.
        path: of the request: endpoints have errors of different forms.

    Attributes:
        has_started: whether the client saw a part of the answer.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._is_response = path == "/v1/responses"
        self._head: ReplyHead | None = None
        self._body: list[bytes] = []
        self._is_head_sent = False
        self._num_events = 0
        self.has_started = False

    @property
    def is_refusal(self) -> bool:
        """Whether the whole answer says that this replica takes no requests now."""
        if self._head is None or self._head.status not in (429, 503):
            return False
        try:
            return json.loads(b"".join(self._body))["error"]["code"] in _REFUSALS
        except (ValueError, KeyError, TypeError):
            return False

    def restart(self) -> None:
        """Forget what is held back: another replica begins anew."""
        assert not self.has_started
        self._head = None
        self._body.clear()

    def add_head(self, head: ReplyHead, replica: str) -> None:
        """Take a head, and hold it back. Serve's proxy sends the request's id itself."""
        own = tuple(pair for pair in head.headers if pair[0] != HEADER.encode())
        self._head = ReplyHead(head.status, (*own, (REPLICA_HEADER, replica.encode())))

    async def add_body(self, chunk: bytes) -> None:
        """Take a part of the body: whole events, of an event stream."""
        if not self._is_stream:
            self._body.append(chunk)
            return
        events = [one for one in chunk.split(b"\n\n") if one and not one.startswith(b":")]
        self._num_events += len(events)
        self.has_started = self.has_started or bool(events)
        await self._send_head()
        await self._send_body(chunk, is_last=False)

    async def finish(self) -> None:
        """The answer is complete."""
        if self._head is None:
            raise RuntimeError("the answer has no head")
        if self._is_stream:
            await self._send_head()
            await self._send_body(b"", is_last=True)
        elif self._is_head_sent:
            # A stream was promised, and then another replica refused.
            await self._send_body(_error_event(b"".join(self._body)), is_last=True)
        else:
            await self._send_head()
            await self._send_body(b"".join(self._body), is_last=True)

    async def fail(self, error: ApiError) -> None:
        """End with an error: an event, if a stream was promised."""
        if not self._is_head_sent:
            body = error.encode()
            given = {"content-type": "application/json", "content-length": str(len(body))}
            headers = {**error.headers, **given}
            pairs = tuple((name.encode(), value.encode()) for name, value in headers.items())
            self._head = ReplyHead(error.status, pairs)
            await self._send_head()
            await self._send_body(body, is_last=True)
            return
        if self._is_response:
            detail = {"type": "error", "code": error.code, "message": error.message, "param": None}
            data = event({**detail, "sequence_number": self._num_events}, "error")
        else:
            data = event(error.body()) + DONE
        await self._send_body(data, is_last=True)

    @property
    def _is_stream(self) -> bool:
        return self._head is not None and is_event_stream(self._head.headers)

    async def _send_head(self) -> None:
        if self._is_head_sent:
            return
        assert self._head is not None
        self._is_head_sent = True
        start = {"type": "http.response.start", "status": self._head.status}
        await self._send({**start, "headers": list(self._head.headers)})

    async def _send_body(self, data: bytes, *, is_last: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


def is_event_stream(headers: Headers) -> bool:
    """Whether an answer with these headers is one of server-sent events."""
    kind = HeaderReader(raw=list(headers)).get("content-type", "")
    return kind.startswith("text/event-stream")


def _error_event(body: bytes) -> bytes:
    return b"data: %b\n\n%b" % (body, DONE)

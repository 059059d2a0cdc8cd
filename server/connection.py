"""One client's connection: what is no HTTP request is answered in OpenAI's shape too.

Owns: the timer of a head that does not arrive.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

logger = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""Time that the head of a request may take to arrive, and what comes of a body that was refused."""

MAX_HEAD_BYTES = 1 << 16
"""Longest head."""

_CAN_ANSWER = (h11.IDLE, h11.SEND_RESPONSE)


class Connection(H11Protocol):
    """uvicorn's connection, with a limit to how long a head takes, and errors as JSON."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Read on, and wait for the rest of a head that is not complete."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop_head_timer()

    def abort(self) -> None:
        """Close at once; whoever answers on it learns that its client left."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP: uvicorn calls it while it handles the parser's exception."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(
                ApiError(
                    431,
                    f"the head of the request is longer than {MAX_HEAD_BYTES} bytes",
                    code="head_too_large",
                )
            )
        else:
            self._refuse(ApiError(400, f"this is no HTTP request: {error}", code="invalid_http"))

    def _watch_head(self) -> None:
        is_due = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        # Between two requests uvicorn's keep-alive timer runs.
        is_due = is_due and (self.cycle is None or bool(self.conn.trailing_data[0]))
        # The rest of a body is dropped. It stopped uvicorn's timer, and may never end.
        is_due = is_due or self._is_dropping
        if not is_due:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._end_wait)

    @property
    def _is_dropping(self) -> bool:
        """Whether the answer went out before all of the body was there."""
        is_over = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        return is_over and not self.transport.is_closing()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_wait(self) -> None:
        self._head_timer = None
        if self._is_dropping or not self.conn.trailing_data[0]:
            self.transport.close()  # it has its answer, or never said a word
            return
        self._refuse(
            ApiError(
                408,
                f"the head of the request did not arrive within {HEAD_SECONDS:g} seconds",
                code="head_timeout",
            )
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer, if that is still possible, and close."""
        logger.info("%s: %s", error.status, error.message)
        if self.conn.our_state in _CAN_ANSWER:
            body = error.encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            events: list[h11.Event] = [
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

"""``vmalloc top``: a server's page map in the terminal, as it changes.

Owns: the terminal while it runs.  Thread-safety: none; one command.
"""

from __future__ import annotations

import json
import time
from collections import deque

from rich.console import Console, RenderableType
from rich.live import Live

from .page_map_client import Frame, PageMapClient, ServerUnreachableError
from .top_view import page_map_view

RATE_PAUSE_SECONDS = 1.0
"""One frame alone says nothing of rates: it is the second of two."""

NUM_RATES = 120
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 8.0

EXIT_OK = 0


def top(url: str, *, api_key: str | None = None, once: bool = False, as_json: bool = False) -> int:
    """Draw the page map of the server at ``url`` until Ctrl-C; the exit code.

    A server that goes away is waited for, once it was there.

    Args:
        once: print one frame and end; also where the output is no terminal.
        as_json: print frames as JSON, one a line.

    Raises:
        ConfigError: ``url`` is no URL.
        VmallocError: nothing answers there, or it refuses.
    """
    console = Console()
    with PageMapClient(url, api_key) as client:
        try:
            if once or not (as_json or console.is_terminal):
                _print_once(client, console, as_json=as_json)
            elif as_json:
                _print_lines(client)
            else:
                _draw(client, console)
        except KeyboardInterrupt:
            pass
    return EXIT_OK


def _print_once(client: PageMapClient, console: Console, *, as_json: bool) -> None:
    client.frame()
    time.sleep(RATE_PAUSE_SECONDS)
    frame = client.frame()
    if as_json:
        print(json.dumps(frame))
    else:
        console.print(page_map_view(frame, client.url, width=console.width))


def _print_lines(client: PageMapClient) -> None:
    for kind, frame in client.frames():
        if kind == "frame":
            print(json.dumps(frame), flush=True)


def _draw(client: PageMapClient, console: Console) -> None:
    frame = client.frame()  # what is wrong from the start is an error, not something to wait for
    screen = _Screen(client.url, console, frame)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        delay = FIRST_RETRY_SECONDS
        while True:
            try:
                for kind, data in client.frames():
                    delay = FIRST_RETRY_SECONDS
                    screen.take(kind, data)
                    live.update(screen.view(), refresh=True)
                screen.note = "the stream ended; connecting again"
            except ServerUnreachableError:
                screen.note = "the connection was lost; connecting again"
            live.update(screen.view(), refresh=True)
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY_SECONDS)


class _Screen:
    """The newest frame, and the rates of those before it."""

    def __init__(self, url: str, console: Console, frame: Frame) -> None:
        self.note = ""
        self._url = url
        self._console = console
        self._frame = frame
        self._rates: deque[float] = deque(maxlen=NUM_RATES)

    def take(self, kind: str, data: Frame) -> None:
        """A page map, or why there is none."""
        if kind == "state":
            self.note = " ".join(filter(None, (data["state"], data["detail"])))
            return
        self.note = ""
        self._frame = data
        self._rates.append(data["totals"]["tokens_per_s"])

    def view(self) -> RenderableType:
        """What the terminal is to show now."""
        width, height = self._console.size
        return page_map_view(
            self._frame, self._url, list(self._rates), width=width, height=height, note=self.note
        )

"""``vmalloc top``: the page maps of servers in the terminal, as they change.

Owns: the terminal while it runs, and a thread for each server.
Thread-safety: none; one command. Threads only read, and tell the command what came.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.console import Console, RenderableType
from rich.live import Live

from ..errors import VmallocError
from .page_map_client import Frame, PageMapClient, ServerUnreachableError
from .top_fleet import SeenServer, fleet_view
from .top_view import page_map_view

RATE_PAUSE_SECONDS = 1.0
"""One frame alone says nothing of rates: it is the second of two."""

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 8.0

EXIT_OK = 0
EXIT_FAILED = 1


def top(
    urls: Sequence[str], *, api_key: str | None = None, once: bool = False, as_json: bool = False
) -> int:
    """Draw the page maps of the servers at ``urls`` until Ctrl-C; the exit code.

    A server that goes away is waited for. One that does not answer from the start is, where another
    one does; the exit code is 1 then if nothing waits for it.

    Args:
        once: print one frame of each and end; also where the output is no terminal.
        as_json: print frames as JSON, one a line, with the ``url`` they are from.

    Raises:
        ConfigError: one of ``urls`` is no URL.
        VmallocError: nothing answers at any, or it refuses.
    """
    console = Console()
    # Never closed: their threads read until the process ends.
    clients = [PageMapClient(url, api_key) for url in urls]
    seen = _first_frames(clients)
    try:
        if once or not (as_json or console.is_terminal):
            return _print_once(clients, seen, console, as_json=as_json)
        if as_json:
            return _print_lines(clients)
        _draw(clients, seen, console)
    except KeyboardInterrupt:
        pass
    return EXIT_OK


def _first_frames(clients: Sequence[PageMapClient]) -> list[SeenServer]:
    """What all servers have to show now. Raises what is wrong with the first if none answers."""
    seen, failures = [], []
    for client in clients:
        server = SeenServer(client.url)
        try:
            server.take(client.frame())
        except VmallocError as error:
            server.note = str(error)
            failures.append(error)
        seen.append(server)
    if len(failures) == len(clients):
        raise failures[0]
    return seen


def _print_once(
    clients: Sequence[PageMapClient],
    seen: Sequence[SeenServer],
    console: Console,
    *,
    as_json: bool,
) -> int:
    time.sleep(RATE_PAUSE_SECONDS)
    code = EXIT_OK
    for client, server in zip(clients, seen, strict=True):
        try:
            server.take(client.frame())
        except VmallocError as error:
            if len(clients) == 1:
                raise
            server.frame, server.note = None, str(error)
            _complain(error)
            code = EXIT_FAILED
        if as_json and server.frame is not None:
            _print_frame(client.url, server.frame)
    if not as_json:
        console.print(_view(seen, width=console.width, height=None))
    return code


def _print_lines(clients: Sequence[PageMapClient]) -> int:
    """Frames as they come, until every stream has ended."""
    news = _watch(clients, is_patient=False)
    num_left, code = len(clients), EXIT_OK
    while num_left:
        item = news.get()
        if item.kind == "frame":
            assert isinstance(item.what, dict)
            _print_frame(clients[item.idx].url, item.what)
        elif item.kind == "end":
            num_left -= 1
            if isinstance(item.what, VmallocError):
                if len(clients) == 1:
                    raise item.what
                _complain(item.what)
                code = EXIT_FAILED
    return code


def _draw(clients: Sequence[PageMapClient], seen: Sequence[SeenServer], console: Console) -> None:
    news = _watch(clients, is_patient=True)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            width, height = console.size
            live.update(_view(seen, width=width, height=height), refresh=True)
            item = news.get()
            server = seen[item.idx]
            if item.kind == "frame":
                assert isinstance(item.what, dict)
                server.take(item.what)
            else:
                server.note = str(item.what)


def _view(seen: Sequence[SeenServer], *, width: int, height: int | None) -> RenderableType:
    """What the terminal is to show: all of the only server, or an overview of several."""
    only = seen[0]
    if len(seen) > 1 or only.frame is None:
        return fleet_view(seen, width=width, height=height)
    rates = list(only.rates)
    return page_map_view(only.frame, only.url, rates, width=width, height=height, note=only.note)


class _News(NamedTuple):
    """What a server sent: a frame, a word on its state, or the end of its stream and why."""

    idx: int
    kind: Literal["frame", "note", "end"]
    what: Frame | str | VmallocError | None


def _watch(clients: Sequence[PageMapClient], *, is_patient: bool) -> queue.SimpleQueue[_News]:
    """Read all streams; ``is_patient``: connect again where one ends."""
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    for idx, client in enumerate(clients):
        read = _read_again if is_patient else _read
        threading.Thread(target=read, args=(client, idx, news), daemon=True).start()
    return news


def _read(client: PageMapClient, idx: int, news: queue.SimpleQueue[_News]) -> None:
    failure: VmallocError | None = None
    try:
        for kind, data in client.frames():
            news.put(_item(idx, kind, data))
    except VmallocError as error:
        failure = error
    news.put(_News(idx, "end", failure))


def _read_again(client: PageMapClient, idx: int, news: queue.SimpleQueue[_News]) -> None:
    delay, was_there = FIRST_RETRY_SECONDS, False
    while True:
        note = "the stream ended; connecting again"
        try:
            for kind, data in client.frames():
                delay, was_there = FIRST_RETRY_SECONDS, True
                news.put(_item(idx, kind, data))
        except ServerUnreachableError as error:
            note = "the connection was lost; connecting again" if was_there else str(error)
        except VmallocError as error:
            note = f"{error}; asking again"
        news.put(_News(idx, "note", note))
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_RETRY_SECONDS)


def _item(idx: int, kind: str, data: Frame) -> _News:
    if kind == "state":
        return _News(idx, "note", " ".join(filter(None, (data["state"], data["detail"]))))
    return _News(idx, "frame", data)


def _print_frame(url: str, frame: Frame) -> None:
    print(json.dumps({"url": url, **frame}), flush=True)


def _complain(error: VmallocError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)

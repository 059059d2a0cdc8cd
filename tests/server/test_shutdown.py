"""How a server ends: in its own time, in a hurry, and killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.process import DEADLINE_SECONDS, ServerProcess, Stream, assert_error, wait_until


def test_sigterm_under_load(start_server: Callable[..., ServerProcess]) -> None:
    """Running and queued requests end as if nothing happened; new ones are turned away."""
    server = start_server("--max-num-seqs", "4", "--batch-invariant", is_forked=False)
    expected = server.text(max_tokens=300)
    streams = [Stream(server, max_tokens=300) for _ in range(10)]
    server._wait_until(lambda: server.metric("vmalloc_live_requests") == 10, "all are admitted")
    server.process.send_signal(signal.SIGTERM)
    server._wait_until(lambda: server.http.get("/ready").status_code == 503, "it drains")
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
    ):
        response = server.post(path, **body)
        assert_error(response, 503, "engine_draining")
        assert int(response.headers["retry-after"]) >= 1
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    for stream in streams:
        stream.join()
        assert stream.failure is None
        assert (stream.text, stream.finish_reason, stream.is_done) == (expected, "length", True)
    assert server.process.wait(DEADLINE_SECONDS) == 0
    assert server.end() == 0


def test_requests_that_take_too_long_are_told(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--shutdown-timeout", "0.3")
    stream = Stream(server, max_tokens=1900)
    stream.wait_text()
    assert server.end() == 0
    stream.join()
    assert stream.failure is None
    assert stream.error is not None
    assert (stream.error["code"], stream.is_done) == ("engine_stopped", True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(
    number: signal.Signals, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server("--shutdown-timeout", "600")
    streams = [Stream(server, max_tokens=1900, n=8) for _ in range(4)]
    for stream in streams:
        stream.wait_text()
    server.process.send_signal(number)
    server._wait_until(lambda: server.http.get("/ready").status_code == 503, "it drains")
    started = time.monotonic()
    assert server.end(number) == 1
    # Generous: those requests would take minutes.
    assert time.monotonic() - started < 60
    for stream in streams:
        stream.join()
        assert not stream.is_done


def test_a_signal_that_comes_twice_is_one_where_nothing_runs(
    start_server: Callable[..., ServerProcess],
) -> None:
    """As from ``timeout`` and a shell, which signal a process and its group."""
    server = start_server()
    server.process.send_signal(signal.SIGTERM)
    assert server.end(signal.SIGTERM) == 0


def test_a_stream_without_an_end_ends_with_the_server(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    with server.http.stream("GET", "/page-map/events") as response:
        lines = response.iter_lines()
        assert next(lines)
        server.process.send_signal(signal.SIGTERM)
        for _ in lines:
            pass
    assert server.process.wait(DEADLINE_SECONDS) == 0


def test_kill_leaves_nothing_and_a_restart_finds_its_place(
    start_server: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    shared_before = set(os.listdir("/dev/shm"))
    uds = tmp_path / "uds"
    server = start_server("--uds", str(uds), is_forked=False)
    server.wait_ready()
    pid = server.process.pid
    assert (
        server.http.post("/v1/completions", json={"prompt": "def ", "max_tokens": 5}).status_code
        == 200
    )
    open_files = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    # Its memory has no name in any file system.
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "/dev/shm" not in mapped
    assert not [path for path in open_files if path.startswith(("/dev/shm", str(scratch)))]
    children = _children(pid)
    server.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert os.listdir(scratch) == []
    assert set(os.listdir("/dev/shm")) <= shared_before | _not_ours()
    assert uds.is_socket()  # the one thing that a killed process cannot take away
    again = start_server("--uds", str(uds))
    assert again.text()
    assert again.end() == 0
    assert not uds.exists()


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task")
    return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _not_ours() -> set[str]:
    """What others who run at the same time have made meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("vmalloc")}

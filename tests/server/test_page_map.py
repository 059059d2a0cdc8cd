"""The page map over HTTP, and in the terminal, from a real server process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console

from vmalloc import ConfigError
from vmalloc.server.page_map_client import read_url
from vmalloc.server.top_view import SPARKS, bytes_by_kind, page_map_view, spark_line

from .process import REPOSITORY, ServerProcess, running_server
from .running import RunningServer

HANG_SECONDS = 60.0
KEY = "a-key"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = ("--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16")
    with running_server(*settings) as process:
        yield process


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    """One that wants a key."""
    settings = ("--kv-cache-memory-bytes", str(16 << 20), "--kv-backend", "paged")
    with running_server("--api-key", KEY, *settings) as process:
        yield process


class Generating:
    """Requests that stream in the background until the block ends."""

    def __init__(self, server: ServerProcess, num_requests: int = 3, n: int = 1) -> None:
        self._server = server
        self._n = n
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._generate, args=(idx,)) for idx in range(num_requests)
        ]

    def __enter__(self) -> Generating:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()

    def _generate(self, idx: int) -> None:
        body = {
            "model": "demo",
            "prompt": "import os\n" * 30 + f"x = {idx}\n",
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
            "n": self._n,
        }
        while not self._stop.is_set():
            url = f"{self._server.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=HANG_SECONDS) as response:
                for _ in response.iter_lines():
                    if self._stop.is_set():
                        break


def events(url: str, **options: Any) -> Iterator[dict[str, Any]]:
    """Page maps of the stream."""
    options = {"timeout": HANG_SECONDS, **options}
    with httpx.stream("GET", f"{url}/page-map/events", **options) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        for line in response.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


def run_top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmalloc.cli", "top", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_one_page_map(server: ServerProcess) -> None:
    frame = httpx.get(f"{server.url}/page-map").json()
    assert (frame["state"], frame["model"]) == ("running", "demo")
    page_map, totals = frame["map"], frame["totals"]
    assert page_map["backend"] == "virtual"
    assert totals["capacity_bytes"] == 64 << 20
    assert totals["reserved_bytes"] >= totals["committed_bytes"]
    assert set(page_map["slot_pages"]) != {0}


def test_events_follow_what_happens(server: ServerProcess) -> None:
    with Generating(server, n=2):
        for frame in events(server.url):
            totals, slots = frame["totals"], frame["map"]["slots"]
            names = {slot["request_id"] for slot in slots if slot["seq_id"] is not None}
            kinds = {kind for slot in slots for runs in slot["runs"] for kind, _ in runs}
            is_busy = totals["running_seqs"] >= 4 and totals["tokens_per_s"] > 0
            if is_busy and len(names) >= 2 and {"live", "shared"} <= kinds:
                break
        assert totals["live_bytes"] > 0
        assert totals["shared_bytes"] > 0
    for frame in events(server.url):
        if frame["totals"]["running_seqs"] == 0 and frame["totals"]["tokens_per_s"] == 0:
            break
    slots = frame["map"]["slots"]
    assert not [slot for slot in slots if slot["seq_id"] is not None and not slot["is_padding"]]


def test_events_come_four_times_a_second_at_most(server: ServerProcess) -> None:
    with Generating(server):
        times = [frame["time"] for frame, _ in zip(events(server.url), range(8), strict=False)]
    assert times == sorted(times)
    # The server's own clock; the margin is for one that is set meanwhile.
    assert times[-1] - times[0] >= 7 * 0.24


def test_nothing_is_computed_once_the_clients_left() -> None:
    running = RunningServer()
    try:
        feed = running.state.page_map
        streams = [events(running.url) for _ in range(3)]
        for stream in streams:
            assert next(stream)
        assert feed.num_watchers == 3
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + HANG_SECONDS
        while feed.num_watchers > 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        num_looks = feed.num_looks
        running.complete(prompt="import os", max_tokens=300)
        assert feed.num_looks == num_looks
    finally:
        running.close()


def test_an_idle_server_gives_pages_back_although_somebody_watches() -> None:
    settings = ("--no-enable-prefix-caching", "--release-idle-after", "0.5")
    with running_server(*settings, "--kv-cache-memory-bytes", str(16 << 20)) as process:
        stream = events(process.url)
        next(stream)
        process.complete("import os", max_tokens=200)
        for frame in stream:
            totals = frame["totals"]
            if totals["generated_tokens"] == 200 and not frame["map"]["slots"]:
                break
        assert totals["free_pages"] == 0


def test_the_stream_does_not_keep_a_server_alive() -> None:
    with running_server("--kv-cache-memory-bytes", str(16 << 20)) as process:
        stream = events(process.url)
        assert next(stream)
        assert process.end() == 0
        list(stream)  # it ended, in order


def test_a_key_is_asked_for(guarded: ServerProcess) -> None:
    for path in ("/page-map", "/page-map/events"):
        response = httpx.get(guarded.url + path)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{guarded.url}/page-map", headers=headers).json()["map"]["backend"] == "paged"
    assert next(events(guarded.url, headers=headers))["state"] == "running"


def test_top_prints_one_frame(server: ServerProcess) -> None:
    with Generating(server, num_requests=4):
        next(frame for frame in events(server.url) if frame["totals"]["running_seqs"] >= 3)
        result = run_top(server.url.removeprefix("http://"), "--once")
    assert result.returncode == 0, result.stderr
    assert "64.0 MiB in use" in result.stdout
    assert "running" in result.stdout
    assert "█" in result.stdout


def test_top_prints_json(server: ServerProcess) -> None:
    result = run_top(server.url, "--once", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["map"]["backend"] == "virtual"


def test_top_draws_until_it_is_told_to_end(server: ServerProcess) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vmalloc.cli", "top", server.url, "--json"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with Generating(server):
        frames = [json.loads(process.stdout.readline()) for _ in range(4)]
    process.send_signal(2)
    process.stdout.close()
    assert process.wait(HANG_SECONDS) == 0
    assert frames[-1]["time"] > frames[0]["time"]


def test_top_says_what_is_wrong(guarded: ServerProcess, server: ServerProcess) -> None:
    nobody = run_top("http://127.0.0.1:1", "--once")
    assert nobody.returncode == 2
    assert "error: nothing answers at http://127.0.0.1:1" in nobody.stderr
    without_key = run_top(guarded.url, "--once")
    assert without_key.returncode == 2
    assert "there is no API key" in without_key.stderr
    assert "--api-key" in without_key.stderr
    assert run_top(guarded.url, "--once", "--api-key", KEY).returncode == 0
    elsewhere = run_top(f"{server.url}/docs", "--once")
    assert elsewhere.returncode == 2
    assert "no vmalloc server" in elsewhere.stderr
    assert "error: url is 'ftp://x'" in run_top("ftp://x", "--once").stderr


def test_top_needs_no_torch() -> None:
    script = "import sys, vmalloc.server.top; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("https://host/prefix/v1", "https://host/prefix"),
        ("http://host:80?x=1#y", "http://host"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert read_url(text) == url


@pytest.mark.parametrize("text", ["", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="url is"):
        read_url(text)


RUNNING = [["shared", 2], ["live", 3], ["ahead", 1]]
PARKED = [["parked", 3]]
FRAME: dict[str, Any] = {
    "time": 0.0,
    "state": "running",
    "model": "some-model",
    "map": {
        "backend": "virtual",
        "is_asleep": False,
        "page_bytes": 1 << 20,
        "row_bytes": [1 << 16],
        "slot_pages": [64],
        "num_slots": 8,
        "shared_refs": 2,
        "held_pages": 0,
        "cached_pages": 1,
        "slots": [
            {
                "slot_idx": idx,
                "seq_id": None if idx == 2 else idx,
                "request_id": None if idx == 2 else f"cmpl-{idx}{'0' * 20}",
                "num_tokens": 0 if idx == 2 else 70,
                "is_padding": False,
                "runs": [
                    [["parked", 3]] if idx == 2 else [["shared", 2], ["live", 3], ["ahead", 1]]
                ],
            }
            for idx in range(3)
        ],
    },
    "totals": {
        "reserved_bytes": 1 << 40,
        "capacity_bytes": 32 << 20,
        "committed_bytes": 8 << 20,
        "live_bytes": 7 << 20,
        "ahead_bytes": 2 << 20,
        "parked_bytes": 3 << 20,
        "cached_bytes": 1 << 20,
        "shared_bytes": 2 << 20,
        "swapped_bytes": 0,
        "retired_pages": 0,
        "running_seqs": 2,
        "waiting": 5,
        "preemptions": 1,
        "prefix_hit_tokens": 3,
        "prefix_queried_tokens": 4,
        "tokens_per_s": 12.5,
        "pages_mapped_per_s": 0.5,
    },
}


def drawn(frame: dict[str, Any], width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=100, color_system=None)
    console.print(page_map_view(frame, "http://h", [0.0, 5.0], width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_frame_is_drawn_with_a_line_a_slot() -> None:
    lines = drawn(FRAME, 80)
    slots = [line.split() for line in lines if line.startswith("   ")]
    assert [slot[0] for slot in slots] == ["0", "1", "2"]
    assert slots[0][1:] == ["00000000000…", "70", "▚▚███□"]
    assert slots[2][1:] == ["free", "░░░"]
    assert "14.0 MiB of 32.0 MiB in use, 1.0 TiB of addresses reserved" in lines
    assert any("75%" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_memory_by_kind_counts_every_page_once() -> None:
    sizes = bytes_by_kind(FRAME["map"], FRAME["totals"])
    assert {kind: size >> 20 for kind, size in sizes.items()} == {
        "live": 6,
        "shared": 2,
        "ahead": 2,
        "parked": 3,
        "cached": 1,
        "retired": 0,
    }


def test_a_small_terminal_counts_what_it_cannot_show() -> None:
    assert any("and 2 more slots" in line for line in drawn(FRAME, 60, height=15))
    assert all(len(line) <= 40 for line in drawn(FRAME, 40, height=15))


def test_spark_lines() -> None:
    assert spark_line([0, 1, 2, 4], 3) == SPARKS[1] + SPARKS[3] + SPARKS[7]
    assert spark_line([0.0, 0.0], 8) == SPARKS[0] * 2
    assert spark_line([], 8) == ""

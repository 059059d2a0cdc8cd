"""A server over two ranks, as its users run it: what it shows of them, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chromium import launched_chromium
from vmalloc.server.rank_families import PLAN_COUNTERS, RANK_COUNTERS, RANK_GAUGES

from .process import REPOSITORY, ServerProcess, running_server, wait_until

CAP = 16 << 20
FLAGS = ("demo", "--tensor-parallel-size", "2", "--kv-cache-memory-bytes", str(CAP))
END_SECONDS = 10.0
"""In which nothing may be left of a server that lost a rank."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(*FLAGS, "--max-num-seqs", "8") as process:
        process.complete(max_tokens=40, n=2, temperature=1)
        yield process
        (rank,) = children_of(process.process.pid)
    assert not Path(f"/proc/{rank}").exists()


def children_of(pid: int) -> list[int]:
    """Processes that a process started and that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"\nPPid:\t{pid}\n" in text and "\nState:\tZ" not in text:
            found.append(int(status.parent.name))
    return found


def families(server: ServerProcess) -> dict[str, dict[str, float]]:
    """Samples of every family by the label ``rank``, which is empty where it has none."""
    text = server.http.get("/metrics").text
    return {
        family.name: {sample.labels.get("rank", ""): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


def run_top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmalloc.cli", "top", *arguments, "--once"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )


class TestViews:
    def test_metrics_have_the_whole_engine_and_each_rank(self, server: ServerProcess) -> None:
        seen = families(server)
        assert seen["vmalloc_tensor_parallel_size"][""] == 2
        assert seen["vmalloc_kv_capacity_bytes"][""] == 2 * CAP
        created = seen["vmalloc_rank_kv_created_pages"]
        assert set(created) == {"0", "1"}
        assert created["0"] == created["1"] == seen["vmalloc_kv_created_pages"][""] > 0
        for field in (*RANK_GAUGES, *RANK_COUNTERS):
            assert set(seen[f"vmalloc_rank_kv_{field}"]) == {"0", "1"}
        for rank in ("0", "1"):
            mapped = seen["vmalloc_rank_kv_critical_pages"][rank]
            assert mapped + seen["vmalloc_rank_kv_background_pages"][rank] > 0
            assert seen["vmalloc_rank_peak_resident_memory_bytes"][rank] > 50 << 20
        for name, _ in PLAN_COUNTERS.values():
            assert f"vmalloc_plan_{name}" in seen
        assert seen["vmalloc_plan_steps"][""] == seen["vmalloc_engine_steps"][""] > 0
        assert seen["vmalloc_plan_wait_seconds"][""] > 0
        assert seen["vmalloc_plan_void"][""] == 0

    def test_every_name_of_ranks_is_in_the_docs(self, server: ServerProcess) -> None:
        text = (REPOSITORY / "docs" / "operations.md").read_text()
        documented = set(re.findall(r"`(vmalloc_(?:rank|plan)_[a-z0-9_]+)[`{]", text))
        exported = {
            family.name + ("_total" if family.type == "counter" else "")
            for family in text_string_to_metric_families(server.http.get("/metrics").text)
            if family.name.startswith(("vmalloc_rank_", "vmalloc_plan_"))
        }
        assert documented == {name for name in exported if not name.endswith("_created")}

    def test_the_page_map_has_all_ranks_and_each(self, server: ServerProcess) -> None:
        frame = server.http.get("/page-map").json()
        first, second = frame["ranks"]
        assert [first["rank"], second["rank"]] == [0, 1]
        whole, totals = frame["map"], frame["totals"]
        for rank in (first, second):
            assert 2 * rank["map"]["page_bytes"] == whole["page_bytes"]
            assert 2 * rank["totals"]["capacity_bytes"] == totals["capacity_bytes"] == 2 * CAP
            assert rank["totals"]["created_pages"] > 0
            assert rank["map"]["num_slots"] == whole["num_slots"]
            assert rank["map"]["cached_pages"] == whole["cached_pages"]
        sums = sum(rank["totals"]["cached_bytes"] for rank in (first, second))
        assert totals["cached_bytes"] == sums > 0

    def test_top_has_a_line_a_rank(self, server: ServerProcess) -> None:
        result = run_top(server.url)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert [line.split()[1] for line in lines if line.startswith("rank ")] == ["0", "1"]
        assert "of 32.0 MiB in use" in result.stdout

    def test_the_page_shows_all_ranks_or_one(self, server: ServerProcess) -> None:
        with launched_chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(f"{server.url}/")
            page.locator("#ranks:not([hidden])").wait_for()
            names = page.locator("#ranks label").all_text_contents()
            assert names == ["All 2 ranks", "Rank 0", "Rank 1"]
            assert page.locator("#capacity").text_content() == "32 MiB"
            page.locator("#ranks input").nth(2).check(force=True)
            assert page.locator("#capacity").text_content() == "16 MiB"
            rows = page.locator("#rank-figures tbody th").all_text_contents()
            assert rows == ["Rank 0", "Rank 1"]
            assert complaints == []

    def test_top_shows_several_servers_and_outlives_one_that_is_away(
        self, server: ServerProcess
    ) -> None:
        nobody = "http://127.0.0.1:1"
        result = run_top(server.url, nobody, server.url)
        assert result.returncode == 1
        assert "2 of 3 servers" in result.stdout
        assert result.stdout.count("2 ranks") == 2
        assert f"{nobody}  nothing answers" in result.stdout
        assert f"error: nothing answers at {nobody}" in result.stderr
        result = run_top(nobody, server.url, "--json")
        assert [json.loads(line)["url"] for line in result.stdout.splitlines()] == [server.url]
        nothing = run_top(nobody, "http://127.0.0.1:2")
        assert nothing.returncode == 2
        assert nothing.stdout == ""


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def assert_nothing_is_left(server: ServerProcess, ranks: list[int], shared: set[str]) -> None:
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "ranks ended")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
    assert set(os.listdir("/dev/shm")) <= shared


class TestLoss:
    def test_a_rank_that_is_killed_ends_streams_with_its_name_and_the_server(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        shared = set(os.listdir("/dev/shm"))
        server = start_server(*FLAGS)
        ranks = children_of(server.process.pid)
        errors: list[BaseException] = []
        has_text = [threading.Event() for _ in range(3)]

        def read(idx: int) -> None:
            try:
                for _ in client_of(server).completions.create(
                    model="demo",
                    prompt="def ",
                    max_tokens=1900,
                    stream=True,
                    extra_body={"ignore_eos": True},
                ):
                    has_text[idx].set()
            except openai.APIError as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(idx,)) for idx in range(3)]
        for thread in threads:
            thread.start()
        assert all(event.wait(60) for event in has_text)
        killed = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        assert len(errors) == 3
        for error in errors:
            assert "rank 1 was lost: its process was killed by SIGKILL (9)" in str(error)
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert server.http.get("/ready").status_code == 503
        refused = server.post("/v1/completions", prompt="x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert server.process.wait(60) == 1
        assert time.monotonic() - killed < END_SECONDS
        assert_nothing_is_left(server, ranks, shared)
        assert "Traceback" not in server.log, server.log

    def test_a_server_without_work_notices_too(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        shared = set(os.listdir("/dev/shm"))
        server = start_server(*FLAGS)
        ranks = children_of(server.process.pid)
        killed = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert time.monotonic() - killed < END_SECONDS
        assert_nothing_is_left(server, ranks, shared)
        assert "rank 1 was lost" in server.log

    def test_ranks_go_with_a_server_that_is_killed(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        shared = set(os.listdir("/dev/shm"))
        server = start_server(*FLAGS)
        ranks = children_of(server.process.pid)
        assert len(ranks) == 1
        server.process.kill()
        server.process.wait(60)
        assert_nothing_is_left(server, ranks, shared)

    def test_a_port_that_is_taken_is_bad_input(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            server = start_server(*FLAGS, "--tensor-parallel-port", port, waits=False)
            assert server.process.wait(60) == 2
        (line,) = [line for line in server.log.splitlines() if line.startswith("error: ")]
        assert f"tensor_parallel_port is {port}" in line

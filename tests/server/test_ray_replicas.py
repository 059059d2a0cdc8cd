"""Two replicas in a real Ray, behind one address: routing, faults, the whole, the end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import pytest

from .prefix_load import family_prompts
from .process import DEADLINE_SECONDS, Stream, wait_until

pytest.importorskip("ray")

from .ray_cluster import ReplicasProcess, descendants, serve_run

KV_BYTES = 11 << 20
"""Of a replica: the prefixes of 5 or 6 of the 10 families, one of which takes 1.9 MiB."""

ORIGIN = "http://page.example"
SETTINGS = {"kv_cache_memory_bytes": KV_BYTES, "max_num_seqs": 4, "swap_space_bytes": 0}
FLAGS = ("--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-seqs", "4", "--swap-space", "0")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicasProcess]:
    log_path = tmp_path_factory.mktemp("replicas") / "server.log"
    keys = ("--admin-api-key", "secret", "--allowed-origins", ORIGIN)
    # A short name: there are sockets in it.
    with TemporaryDirectory(prefix="ray-") as folder:
        flags = ("--replicas", "2", *keys, *FLAGS)
        server = ReplicasProcess("demo", *flags, log_path=log_path, RAY_TMPDIR=folder)
        (own,) = Path(folder).iterdir()
        assert own.stat().st_mode & 0o077 == 0, "nobody else gets at the sockets of Ray"
        yield server
        _end(server)
        assert list(Path(folder).iterdir()) == []


def _end(server: ReplicasProcess) -> None:
    server.http.close()
    below = descendants(server.process.pid)
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(DEADLINE_SECONDS)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "all ended")


def cached_tokens(url: str) -> tuple[int, int, set[str]]:
    """(cached, all) prompt tokens of the load, and who answered."""
    names: set[str] = set()

    async def run() -> list[tuple[int, int]]:
        slots = asyncio.Semaphore(4)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=DEADLINE_SECONDS, max_retries=0
        ) as client:

            async def ask(prompt: str) -> tuple[int, int]:
                async with slots:
                    raw = await client.completions.with_raw_response.create(
                        model="demo", prompt=prompt, max_tokens=4, temperature=0
                    )
                names.add(raw.headers["x-vmalloc-replica"])
                usage = raw.parse().usage
                assert usage is not None
                assert usage.prompt_tokens_details is not None
                return usage.prompt_tokens_details.cached_tokens or 0, usage.prompt_tokens

            return await asyncio.gather(*(ask(prompt) for _, prompt in family_prompts(0)))

    counts = asyncio.run(run())
    return sum(one for one, _ in counts), sum(one for _, one in counts), names


def test_the_whole_answers_as_one_server(replicas: ReplicasProcess) -> None:
    http = replicas.http
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert len(health["replicas"]) == 2
    assert http.get("/ready").status_code == 200
    assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
    named = http.get("/nowhere", headers={"x-request-id": "mine"})
    assert named.status_code == 404
    assert named.json()["error"]["code"] == "not_found"
    assert named.headers.get_list("x-request-id") == ["mine"]
    bad = replicas.post("/v1/completions", prompt="def ", max_tokens=-1)
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "max_tokens"
    json_kind = {"content-type": "application/json"}
    torn = http.post("/v1/completions", content=b"{", headers=json_kind)
    assert torn.json()["error"]["code"] == "invalid_json"
    assert replicas.post("/abort", request_id="nobody").status_code == 404
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.head("/health").status_code == 200
    assert http.head("/metrics").status_code == 405


def test_pages_of_allowed_origins_may_call(replicas: ReplicasProcess) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    assert replicas.http.options("/v1/completions", headers=asked).status_code == 200
    answer = replicas.http.get("/v1/models", headers={"origin": ORIGIN})
    assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]


def test_metrics_and_the_page_map_are_of_both(replicas: ReplicasProcess) -> None:
    names = replicas.replicas()
    page = replicas.http.get("/metrics").text
    for name in names:
        assert replicas.metric("vmalloc_live_requests", replica=name) == 0
    heads = [line for line in page.splitlines() if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads))
    frame = replicas.http.get("/page-map").json()
    assert frame["totals"]["capacity_bytes"] >= 1.9 * KV_BYTES
    with replicas.http.stream("GET", "/page-map/events") as response:
        assert next(response.iter_lines()).startswith("data: ")


def test_administration_is_told_to_all(replicas: ReplicasProcess) -> None:
    refused = replicas.http.post("/admin/prefix-cache/flush")
    assert refused.status_code == 401
    key = {"authorization": "Bearer secret"}
    told = replicas.http.post("/admin/prefix-cache/flush", headers=key).json()
    assert sorted(told["replicas"]) == sorted(replicas.replicas())


def test_routing_by_prefix_finds_more_in_the_cache(
    replicas: ReplicasProcess, tmp_path: Path
) -> None:
    """10 families, each of 20 requests; the two caches together hold all prefixes, one of them
    half. By prefix each replica keeps its families, at random each sees them all."""
    by_prefix, num_tokens, names = cached_tokens(replicas.url)
    assert len(names) == 2
    with serve_run(tmp_path, num_replicas=2, routing="random", routing_seed=0, **SETTINGS) as url:
        at_random, same_tokens, names = cached_tokens(url)
    assert len(names) == 2
    assert same_tokens == num_tokens
    print(f"cached of {num_tokens}: {by_prefix} by prefix, {at_random} at random")
    assert at_random > 0
    assert by_prefix >= 1.5 * at_random


def test_a_client_that_leaves_ends_its_request(replicas: ReplicasProcess) -> None:
    body = {"prompt": "def ", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with replicas.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert replicas.metric("vmalloc_live_requests") == 1
    wait_until(lambda: replicas.metric("vmalloc_live_requests") == 0, "it is aborted")


def test_the_whole_is_well_while_one_of_them_answers(replicas: ReplicasProcess) -> None:
    names = replicas.replicas()
    silent = replicas.pid_of(names[0])
    os.kill(silent, signal.SIGSTOP)
    try:
        health = replicas.http.get("/health")
        assert health.status_code == 200
        assert [one["replica"] for one in health.json()["replicas"]] == names[1:]
    finally:
        os.kill(silent, signal.SIGCONT)


def test_a_killed_replica_loses_only_what_had_started(replicas: ReplicasProcess) -> None:
    """Four streams fill a replica, more requests wait there, others run on the second one."""
    family = "def family(self, value):\n    return value\n" * 8
    running = [Stream(replicas, family, max_tokens=1500) for _ in range(4)]
    for stream in running:
        stream.wait_text()
    victim = _replica_of(replicas, family)
    waiting = [Stream(replicas, family, max_tokens=8) for _ in range(3)]
    answers: list[httpx.Response] = []

    def ask(prompt: str) -> None:
        answers.append(replicas.post("/v1/completions", prompt=prompt, max_tokens=8))

    prompts = [family, family, "import os\n" * 30, "class Other:\n" * 30]
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # all are on their way
    os.kill(replicas.pid_of(victim), signal.SIGKILL)
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert [answer.status_code for answer in answers] == [200] * len(prompts)
    assert victim not in {answer.headers["x-vmalloc-replica"] for answer in answers}
    for stream in waiting:
        stream.join()
        assert (stream.is_done, stream.error, stream.failure) == (True, None, None)
    for stream in running:
        stream.join()
        assert stream.failure is None
        assert stream.is_done
        assert stream.error is not None
        assert stream.error["code"] == "replica_lost"
    assert replicas.post("/v1/completions", prompt=family, max_tokens=4).status_code == 200
    wait_until(
        lambda: len(replicas.replicas()) == 2 and victim not in replicas.replicas(),
        "another one takes its place",
    )


def _replica_of(replicas: ReplicasProcess, prompt: str) -> str:
    """Who gets this prompt. It is refused, so that nothing waits."""
    raw: Any = replicas.post("/v1/completions", prompt=prompt, max_tokens=-1)
    assert raw.status_code == 400
    return str(raw.headers["x-vmalloc-replica"])


def test_sigterm_lets_requests_end(replicas: ReplicasProcess) -> None:
    stream = Stream(replicas, "def ", max_tokens=1500)
    seen: list[str] = []
    watched = threading.Thread(target=_watch, args=(replicas, seen))
    watched.start()
    stream.wait_text()
    wait_until(lambda: bool(seen), "a page map comes")
    replicas.process.send_signal(signal.SIGTERM)
    wait_until(
        lambda: replicas.post("/v1/completions", prompt="x", max_tokens=1).status_code == 503,
        "it drains",
    )
    assert replicas.http.get("/ready").status_code == 503
    health = replicas.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert replicas.process.wait(DEADLINE_SECONDS) == 0
    stream.join()
    assert stream.is_done
    assert stream.error is None
    watched.join(DEADLINE_SECONDS)
    assert '"state":"draining"' in seen[-1]


def _watch(replicas: ReplicasProcess, seen: list[str]) -> None:
    """Note every line of the page map's events."""
    with replicas.http.stream("GET", "/page-map/events") as response:
        for line in response.iter_lines():
            if line:
                seen.append(line)

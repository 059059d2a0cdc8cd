"""``vmalloc bench``: a load that repeats, measures that add up, failures by class."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.server.running import DEADLINE_SECONDS, RunningServer
from tests.server.scraping import scrape, settled, value
from vmalloc import cli
from vmalloc.errors import ConfigError
from vmalloc.server.bench_client import EXACT_PROMPTS, TEXT_PROMPTS, run_bench
from vmalloc.server.bench_load import BenchSettings, plan_load, read_goodput
from vmalloc.server.bench_result import (
    BenchResult,
    RequestResult,
    bench_report,
    percentile,
    statistics_ms,
)
from vmalloc.server.config import ServerConfig

URL = "http://localhost:1"
TOKENS = list(range(50, 90))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer()
    yield running
    running.wait_idle()
    running.close()


def settings_for(server: RunningServer, **changes: Any) -> BenchSettings:
    defaults: dict[str, Any] = {
        "url": server.url,
        "num_prompts": 12,
        "input_len": 20,
        "output_len": 8,
        "seed": 3,
    }
    return BenchSettings(**{**defaults, **changes})


def test_the_same_seed_makes_the_same_load() -> None:
    settings = BenchSettings(url=URL, request_rate=5.0, seed=4)
    load = plan_load(settings, TOKENS, None)
    assert load == plan_load(settings, TOKENS, None)
    assert load != plan_load(BenchSettings(url=URL, request_rate=5.0, seed=5), TOKENS, None)
    assert len(load) == settings.num_prompts
    assert all(set(one.prompt) <= set(TOKENS) for one in load)


def test_arrivals_are_a_poisson_process() -> None:
    load = plan_load(BenchSettings(url=URL, request_rate=4.0, num_prompts=4000), TOKENS, None)
    arrivals = np.array([one.arrival_s for one in load])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.1)  # an exponential's spread is its mean
    at_once = plan_load(BenchSettings(url=URL), TOKENS, None)
    assert {one.arrival_s for one in at_once} == {0.0}


def test_lengths_are_log_normal_around_their_medians() -> None:
    settings = BenchSettings(url=URL, num_prompts=4000, input_len=100, output_len=30)
    load = plan_load(settings, TOKENS, None)
    lengths = [len(one.prompt) for one in load]
    assert median(lengths) == pytest.approx(100, rel=0.1)
    assert median(one.num_output_tokens for one in load) == pytest.approx(30, rel=0.1)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.1)
    even = plan_load(BenchSettings(url=URL, length_spread=0), TOKENS, None)
    assert {len(one.prompt) for one in even} == {128}
    for one in plan_load(BenchSettings(url=URL, length_spread=3), TOKENS, 256):
        assert 2 <= len(one.prompt) + one.num_output_tokens <= 256
        assert one.num_output_tokens >= 1


def test_without_token_ids_prompts_are_as_many_words() -> None:
    (one, *_) = plan_load(BenchSettings(url=URL, length_spread=0), None, None)
    assert isinstance(one.prompt, str)
    assert len(one.prompt.split()) == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000'"),
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"request_rate": 0.0}, "request_rate is 0.0"),
        ({"request_rate": math.nan}, "request_rate is nan"),
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"length_spread": 4.0}, "length_spread is 4.0"),
        ({"time_limit_s": -1.0}, "time_limit_s is -1.0"),
        ({"goodput": (("ttfb", 3.0),)}, "ttfb"),
        ({"goodput": (("ttft", 0.0),)}, "ttft:0.0"),
        ({"endpoint": "embeddings"}, "embeddings"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchSettings(**{"url": URL, **changes})


def test_goodput_reads_as_vllms_does() -> None:
    assert read_goodput(["ttft:500 tpot:50", "e2el:2e3"]) == (
        ("ttft", 500.0),
        ("tpot", 50.0),
        ("e2el", 2000.0),
    )
    with pytest.raises(ConfigError, match="'ttft'"):
        read_goodput(["ttft"])


def test_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 100):
        values = sorted(rng.exponential(size=size).tolist())
        for percent in (50, 90, 99):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
        assert statistics_ms(values)["mean"] == pytest.approx(1000 * np.mean(values))
    assert set(statistics_ms([]).values()) == {None}


def result_of(*requests: RequestResult, **changes: Any) -> BenchResult:
    settings = BenchSettings(url=URL, num_prompts=len(requests), **changes)
    return BenchResult(settings, "m", EXACT_PROMPTS, 2.0, list(requests))


def test_measures_are_defined_as_vllms_are() -> None:
    one = RequestResult(10, 5, ttft_s=0.2, e2el_s=1.0, gaps_s=[0.1, 0.3, 0.2, 0.2])
    single = RequestResult(4, 1, ttft_s=0.4, e2el_s=0.4)
    failed = RequestResult(failure="timeout")
    assert one.tpot_s == pytest.approx(0.2)  # without the first token
    assert single.tpot_s is None
    summary = result_of(one, single, failed, goodput=(("ttft", 300.0),)).summary()
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["failures"] == {"timeout": 1}
    assert summary["request_throughput"] == 1.0
    assert summary["output_throughput"] == 3.0
    assert summary["total_token_throughput"] == 10.0
    assert summary["mean_ttft_ms"] == pytest.approx(300.0)
    assert summary["p50_tpot_ms"] == pytest.approx(200.0)
    assert summary["mean_itl_ms"] == pytest.approx(200.0)
    assert summary["request_goodput"] == 0.5
    assert json.loads(json.dumps(summary)) == summary


def test_a_good_request_is_within_every_limit() -> None:
    fast = RequestResult(1, 3, ttft_s=0.1, e2el_s=0.2, gaps_s=[0.05, 0.05])
    slow_start = RequestResult(1, 3, ttft_s=0.6, e2el_s=0.7, gaps_s=[0.05, 0.05])
    slow_tokens = RequestResult(1, 3, ttft_s=0.1, e2el_s=0.5, gaps_s=[0.2, 0.2])
    limits = (("ttft", 500.0), ("tpot", 100.0))
    assert result_of(fast, slow_start, slow_tokens, goodput=limits).num_good == 1
    assert result_of(fast, slow_start, goodput=(("e2el", 700.0),)).num_good == 2


def test_a_run_counts_what_the_server_counts(server: RunningServer) -> None:
    before = settled(server)
    settings = settings_for(server, goodput=(("ttft", 1e9), ("tpot", 1e9)))
    heard: list[RequestResult] = []
    result = run_bench(settings, heard.append)
    planned = plan_load(settings, TOKENS, 2048)  # the same lengths whatever the tokens
    summary = result.summary()
    assert result.model == "demo"
    assert result.prompts == EXACT_PROMPTS
    assert len(heard) == summary["completed"] == settings.num_prompts
    assert (summary["failed"], summary["unfinished"]) == (0, 0)
    assert summary["total_input_tokens"] == sum(len(one.prompt) for one in planned)
    assert summary["total_output_tokens"] == sum(one.num_output_tokens for one in planned)
    assert result.num_good == settings.num_prompts
    for one in result.requests:
        assert one.ttft_s is not None
        assert one.e2el_s is not None
        assert len(one.gaps_s) == one.num_output_tokens - 1
        assert one.e2el_s == pytest.approx(one.ttft_s + sum(one.gaps_s))
    after = settled(server)
    name = "vllm:generation_tokens_total"
    # One token more: of the request ahead of the load.
    assert value(after, name) - value(before, name) == summary["total_output_tokens"] + 1
    table = bench_report(result)
    assert table.row_count > 8


def test_chats_are_measured_alike(server: RunningServer) -> None:
    settings = settings_for(server, endpoint="chat", num_prompts=6)
    summary = run_bench(settings).summary()
    assert summary["prompts"] == TEXT_PROMPTS
    assert (summary["completed"], summary["failed"]) == (6, 0)
    planned = plan_load(settings, None, 2048)
    assert summary["total_output_tokens"] == sum(one.num_output_tokens for one in planned)
    assert summary["mean_ttft_ms"] <= summary["mean_e2el_ms"]


def test_the_same_seed_asks_for_the_same_again(server: RunningServer) -> None:
    first, second = (run_bench(settings_for(server)).summary() for _ in range(2))
    for name in ("total_input_tokens", "total_output_tokens", "completed"):
        assert first[name] == second[name]


def test_no_more_are_under_way_than_asked_for(server: RunningServer) -> None:
    seen: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(value(scrape(server), "vmalloc_live_requests"))
            done.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run_bench(settings_for(server, max_concurrency=2, output_len=30))
    finally:
        done.set()
        watcher.join()
    assert result.summary()["completed"] == 12
    assert 1 <= max(seen) <= 2


def test_a_time_limit_ends_the_run_with_what_there_is(server: RunningServer) -> None:
    settings = settings_for(server, request_rate=0.5, num_prompts=50, time_limit_s=1.0)
    result = run_bench(settings)
    assert result.num_unfinished > 0
    assert len(result.requests) + result.num_unfinished == 50
    assert result.failures == {}
    server.wait_idle()


def test_a_key_is_sent(server: RunningServer) -> None:
    locked = RunningServer(ServerConfig(port=0, api_keys=("the-key",)))
    try:
        with pytest.raises(ConfigError, match=r"GET /v1/models answers 401: invalid_api_key"):
            run_bench(settings_for(locked))
        result = run_bench(settings_for(locked, api_key="the-key", num_prompts=2))
        assert result.summary()["completed"] == 2
    finally:
        locked.close()


def test_what_cannot_work_shows_before_the_load(server: RunningServer) -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        run_bench(BenchSettings(url="http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="first request failed: 404 model_not_found"):
        run_bench(settings_for(server, model="nobody"))


Answer = Callable[[int, str], list[bytes]]
CARD = json.dumps({"data": [{"id": "odd"}]}).encode()


def http_answer(status: str, body: bytes, kind: str = "application/json") -> list[bytes]:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n"
    return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body]


def sse(*events: object) -> bytes:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in events]
    return "".join(f": keep-alive\n\ndata: {text}\n\n" for text in texts).encode()


TOKEN = {"choices": [{"text": "a"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
GOOD = sse(TOKEN, TOKEN, USAGE, "[DONE]")


@contextmanager
def odd_server(answer: Answer) -> Iterator[str]:
    """Another maker's server: lists one model, has no /tokenize, answers the n-th request oddly."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    address: list[str] = []
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = [line for line in head.splitlines() if line.lower().startswith("content-length")]
        body = await reader.readexactly(int(length[0].split(":")[1])) if length else b""
        if path == "/v1/models":
            chunks = http_answer("200 OK", CARD)
        elif path == "/tokenize":
            chunks = http_answer("404 Not Found", b"{}")
        else:
            chunks = answer(count, body.decode())
            count += 1
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        writer.close()

    async def main() -> None:
        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        address.append(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        started.set()
        async with listener:
            await stopped.wait()

    stopped = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert started.wait(DEADLINE_SECONDS)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()


def test_failures_are_counted_by_class() -> None:
    cut = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n"
    answers = [
        http_answer("200 OK", GOOD),  # ahead of the load
        http_answer("200 OK", GOOD),
        http_answer("429 Too Many", json.dumps({"error": {"code": "queue_full"}}).encode()),
        http_answer("500 Oops", b"no json"),
        [cut + sse(TOKEN)],
        http_answer("200 OK", sse(TOKEN)),
        http_answer("200 OK", sse(TOKEN, {"error": {"code": "kv_cache_exhausted"}})),
        http_answer("200 OK", sse(USAGE, "[DONE]")),
        http_answer("200 OK", b"data: {rubbish\n\n"),
    ]
    with odd_server(lambda count, body: answers[count]) as url:
        result = run_bench(
            BenchSettings(url=url, num_prompts=len(answers) - 1, max_concurrency=1, input_len=5)
        )
    assert result.prompts == TEXT_PROMPTS
    assert result.failures == {
        "429 queue_full": 1,
        "500 Oops": 1,
        "cut short: RemoteProtocolError": 1,
        "cut short: no [DONE]": 1,
        "event kv_cache_exhausted": 1,
        "no token came": 1,
        "cut short: JSONDecodeError": 1,
    }
    (completed,) = result.completed
    assert (completed.num_input_tokens, completed.num_output_tokens) == (7, 2)
    assert len(completed.gaps_s) == 1


def test_the_role_of_a_chat_is_no_token() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    word = {"choices": [{"delta": {"content": "a"}}]}
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    bodies: list[dict[str, Any]] = []

    def answer(count: int, body: str) -> list[bytes]:
        bodies.append(json.loads(body))
        return http_answer("200 OK", sse(role, word, word, word, end, USAGE, "[DONE]"))

    with odd_server(answer) as url:
        result = run_bench(
            BenchSettings(url=url, endpoint="chat", num_prompts=2, ignore_eos=False, input_len=4)
        )
    assert [len(one.gaps_s) for one in result.completed] == [2, 2]
    assert bodies[1]["messages"][0]["role"] == "user"
    assert "ignore_eos" not in bodies[1]
    assert bodies[1]["stream_options"] == {"include_usage": True}


def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["vmalloc", "bench", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as caught:
        code = int(caught.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_a_table_or_json(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    load = (server.url, "--num-prompts", "3", "--input-len", "9", "--output-len", "4")
    code, out, _ = run_cli(monkeypatch, capsys, *load, "--goodput", "ttft:1e9")
    assert code == 0
    for words in ("Time to first token", "p99", "3 of 3", "Goodput (ttft:1e+09)"):
        assert words in out
    path = tmp_path / "result.json"
    code, out, _ = run_cli(monkeypatch, capsys, *load, "--json", "--output", str(path))
    assert code == 0
    assert json.loads(out) == json.loads(path.read_text())
    assert json.loads(out)["completed"] == 3
    code, out, err = run_cli(monkeypatch, capsys, "http://127.0.0.1:9")
    assert (code, out) == (cli.EXIT_BAD_INPUT, "")
    assert "cannot be reached" in err


def test_ctrl_c_shows_what_there_is(server: RunningServer) -> None:
    arguments = ["bench", server.url, "--num-prompts", "500", "--request-rate", "20", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vmalloc.cli", *arguments, "--output-len", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    name = "vllm:request_success_total"
    before = value(scrape(server), name, finished_reason="length")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while value(scrape(server), name, finished_reason="length") < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == cli.EXIT_FAILED, err
    summary = json.loads(out)
    assert summary["completed"] >= 3
    assert summary["unfinished"] > 0
    assert summary["completed"] + summary["unfinished"] == 500
    assert summary["failed"] == 0

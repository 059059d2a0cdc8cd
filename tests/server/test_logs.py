"""Log lines: their two forms, the request they belong to, and what is never in them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.app_thread import make_state
from tests.server.running import DEADLINE_SECONDS, RunningServer
from vmalloc.engine import EngineRequest, LLMEngine, SamplingParams
from vmalloc.server.config import ServerConfig
from vmalloc.server.logs import JsonFormatter, TextFormatter, log_prompts, one_line, setup_logs
from vmalloc.server.request_id import request_id_var
from vmalloc.server.run import DrainingServer
from vmalloc.server.stats_log import StatsLog

Lines = Callable[[], list[dict[str, Any]]]
KEY = "a-very-secret-key"
PROMPT = "class Secret:"


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Everything that the process logs meanwhile, as JSON."""
    stream = io.StringIO()
    handler = setup_logs("json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    # The lines of figures are asked for where they are tested.
    running = RunningServer(ServerConfig(port=0, api_keys=(KEY,), log_stats=False))
    running.http.headers["authorization"] = f"Bearer {KEY}"
    yield running
    running.wait_idle()
    running.close()


def record_of(message: str, *args: object, **kwargs: Any) -> logging.LogRecord:
    return logging.LogRecord("vmalloc.x", logging.INFO, "x.py", 1, message, args, **kwargs)


def access_lines(lines: Lines, count: int) -> list[dict[str, Any]]:
    """The lines of so many responses; each is written just after its client has the response."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(found := [line for line in lines() if "status" in line]) < count:
        assert time.monotonic() < deadline, f"{len(found)} lines, not {count}"
        time.sleep(0.01)
    return found


def test_a_text_line_names_its_request() -> None:
    record = record_of("%d pages", 3, exc_info=None)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    3 pages", TextFormatter().format(record)
    )
    token = request_id_var.set("abc")
    try:
        assert TextFormatter().format(record).endswith("INFO    [abc] 3 pages")
        entry = json.loads(JsonFormatter().format(record))
    finally:
        request_id_var.reset(token)
    assert entry["request_id"] == "abc"
    assert entry["message"] == "3 pages"
    assert (entry["level"], entry["logger"]) == ("info", "vmalloc.x")


def test_a_message_is_one_line_and_cannot_steer_a_terminal() -> None:
    evil = "/x\n2026-01-01 00:00:00.000 INFO    fake \x1b[31m\u2028end"
    assert "\n" not in one_line(evil)
    assert "\x1b" not in one_line(evil)
    line = TextFormatter().format(record_of("%s", evil, exc_info=None))
    assert len(line.splitlines()) == 1
    assert r"\x0a" in line
    assert len(JsonFormatter().format(record_of("%s", evil, exc_info=None)).splitlines()) == 1


def test_an_exception_keeps_its_traceback_in_both_forms() -> None:
    try:
        raise ValueError("the reason")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = record_of("it failed", exc_info=info)
    text = TextFormatter().format(record)
    assert "it failed\nTraceback" in text
    assert json.loads(JsonFormatter().format(record))["exception"].endswith("the reason")


def test_a_request_has_one_line_with_its_figures(server: RunningServer, lines: Lines) -> None:
    answer = server.http.post(
        "/v1/completions",
        json={"model": "demo", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True},
        headers={"x-request-id": "my-request"},
    ).json()
    (line,) = access_lines(lines, 1)
    assert line["request_id"] == "my-request"
    assert line["response_id"] == answer["id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert line["generation_tokens"] == 6
    assert 0 < line["ttft_seconds"] <= line["seconds"]
    assert line["finish_reasons"] == ["length"]
    assert "6 tokens written" in line["message"]


def test_a_streamed_request_is_logged_at_its_end(server: RunningServer, lines: Lines) -> None:
    server.stream(model="demo", prompt=PROMPT, max_tokens=9, ignore_eos=True)
    server.wait_idle()
    (line,) = access_lines(lines, 1)
    assert line["generation_tokens"] == 9
    assert "cut short" not in line["message"]


def test_errors_are_logged_with_their_status(server: RunningServer, lines: Lines) -> None:
    server.http.get("/no/such?key=abcdef")
    server.http.get("/v1/models", headers={"authorization": "Bearer wrong-key"})
    logged = access_lines(lines, 2)
    assert [(line["path"], line["status"]) for line in logged] == [
        ("/no/such", 404),
        ("/v1/models", 401),
    ]
    assert "abcdef" not in json.dumps(lines())


def test_what_monitors_ask_for_is_left_out(server: RunningServer, lines: Lines) -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert server.http.get(path).status_code == 200
    server.http.get("/v1/models")
    (line,) = access_lines(lines, 1)
    assert line["path"] == "/v1/models"


def test_no_prompt_no_text_and_no_key_is_logged(server: RunningServer, lines: Lines) -> None:
    answer = server.complete(model="demo", prompt=PROMPT, max_tokens=8, temperature=0)
    server.stream(model="demo", prompt=PROMPT, max_tokens=8, temperature=0)
    server.post("/v1/completions", model="demo", prompt=PROMPT, max_tokens=10**6)
    assert len(access_lines(lines, 3)) == 3
    logged = json.dumps(lines())
    for secret in (PROMPT, KEY, "wrong-key", json.dumps(answer["choices"][0]["text"])[1:-1]):
        assert secret not in logged


def test_prompts_are_logged_where_it_is_asked_for_and_cut(lines: Lines) -> None:
    running = RunningServer(ServerConfig(port=0, log_requests=True, api_keys=(KEY,)))
    running.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        running.complete(model="demo", prompt="x" * 300, max_tokens=3, temperature=0.5, seed=9)
    finally:
        running.close()
    (line,) = [line for line in lines() if "prompt 0" in line["message"]]
    assert "temperature=0.5" in line["message"]
    assert "seed=9" in line["message"]
    assert KEY not in json.dumps(lines())


def test_long_prompts_are_cut() -> None:
    logger = logging.getLogger("vmalloc.server.logs")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        params = SamplingParams()
        for prompt in ("y" * 1000, [5] * 1000, {"prompt": None, "prompt_token_ids": [6] * 1000}):
            log_prompts("r", [EngineRequest(prompt, params)])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    text, ids, named = stream.getvalue().splitlines()
    assert "'" + "y" * 200 + "'..." in text
    assert "default parameters" in text
    assert ids.count("5, ") == 20
    assert "(1000)" in ids
    assert named.count("6, ") == 20


def test_a_signal_is_no_business_of_the_request_that_it_interrupts() -> None:
    seen: list[str] = []

    class Server(DrainingServer):
        def _start_to_drain(self, signal_name: str) -> None:
            seen.append(request_id_var.get())

    async def work() -> None:
        server = Server(make_state())
        server._loop = asyncio.get_running_loop()
        request_id_var.set("interrupted")
        server.handle_exit(signal.SIGTERM, None)
        while not seen:
            await asyncio.sleep(0)

    asyncio.run(work())
    assert seen == ["-"]


def test_uvicorns_loggers_go_through_ours(lines: Lines) -> None:
    logging.getLogger("uvicorn.error").warning("from uvicorn")
    logging.getLogger("uvicorn.error").info("noise")
    assert [line["message"] for line in lines()] == ["from uvicorn"]


def test_a_second_set_up_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logs("text", first)
    handler = setup_logs("text", second)
    logging.getLogger("vmalloc").info("once")
    logging.getLogger().removeHandler(handler)
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_the_line_of_figures_comes_while_there_is_work(server: RunningServer, lines: Lines) -> None:
    log = StatsLog(server.state.engine, stats_s=0.0)
    log.look()
    server.wait_idle()
    assert [line for line in lines() if "Running" in line["message"]] == []
    answer = server.complete(model="demo", prompt=PROMPT * 9, max_tokens=20, ignore_eos=True)
    wait_for_tokens(server, 20)
    log.look()
    (line,) = [line for line in lines() if "Running" in line["message"]]
    assert line["prompt_tokens_per_s"] > 0
    assert line["generation_tokens_per_s"] > 0
    # Both rates are over the same seconds.
    assert line["prompt_tokens_per_s"] / line["generation_tokens_per_s"] == pytest.approx(
        answer["usage"]["prompt_tokens"] / 20, rel=1e-3
    )
    assert line["capacity_bytes"] == server.on_engine(LLMEngine.kv_stats).capacity_bytes
    for words in ("Avg prompt throughput", "Waiting: 0 reqs", "KV committed", "hit rate"):
        assert words in line["message"]
    log.look()
    assert len([line for line in lines() if "Running" in line["message"]]) == 1


def wait_for_tokens(server: RunningServer, num_tokens: int) -> None:
    """Until the snapshot has the end of what ran."""
    server.wait_idle()
    wanted = server.on_engine(LLMEngine.token_stats)
    while True:
        snapshot = server.state.engine.snapshot
        if snapshot is not None and snapshot.tokens == wanted:
            assert wanted.generation_tokens >= num_tokens
            return


def test_a_burst_of_preemptions_is_one_line(lines: Lines) -> None:
    page = 4096
    running = RunningServer(
        ServerConfig(port=0, log_stats=False),
        page_size=page,
        kv_cache_memory_bytes=100 * page,
        preemption_mode="recompute",
        enable_prefix_caching=False,
    )
    try:
        log = StatsLog(running.state.engine)
        log.look()
        body = {"model": "demo", "prompt": [[idx] * 20 for idx in range(3, 7)], "max_tokens": 50}
        running.complete(**body, ignore_eos=True, temperature=0)
        wait_for_tokens(running, 200)
        stats = running.on_engine(LLMEngine.stats)
        log.look()
        log.look()
    finally:
        running.close()
    assert stats.preempt_recompute > 0
    (line,) = [line for line in lines() if "ran short" in line["message"]]
    assert line["level"] == "warning"
    assert line["preempt_recompute"] == stats.preempt_recompute
    assert line["preempted_tokens"] == stats.preempted_tokens
    assert f"{stats.preempted_tokens} computed tokens dropped" in line["message"]

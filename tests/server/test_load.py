"""More work than there is room for: every request ends as if it were alone, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.faults import small_send_buffers
from tests.server.process import DEADLINE_SECONDS, ServerProcess, Stream, assert_error, events

PAGE_BYTES = 65536  # 16 tokens of the demo model
NUM_STREAMS = 200
NUM_SLOTS = 64
NUM_PROMPTS = 20
NUM_TOKENS = 40
PAGES_OF_ONE = 5
"""Pages that the longest of the streams takes: up to 24 tokens of prompt and 40 of answer."""


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 2000) for _ in range(rng.randint(2, 24))] for _ in range(NUM_PROMPTS)]


def body_of(idx: int) -> dict[str, Any]:
    """Greedy and sampled ones; a salt of its own keeps each from sharing the others' pages."""
    body: dict[str, Any] = {
        "prompt": prompts()[idx % NUM_PROMPTS],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    if idx % 2:
        body.update(temperature=0.8, seed=idx % NUM_PROMPTS)
    return body


async def read_stream(client: httpx.AsyncClient, idx: int) -> tuple[str, str | None]:
    """Text and finish reason of a stream that comes to its end marker."""
    text, reason = "", None
    body = {**body_of(idx), "stream": True, "cache_salt": str(idx)}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines()]
    found = list(events(iter(lines)))
    assert found[-1] == "[DONE]"
    for event in map(json.loads, found[:-1]):
        assert "error" not in event, event
        for choice in event["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
    return text, reason


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_a_pool_too_small_for_its_streams(
    backend: str, start_server: Callable[..., ServerProcess]
) -> None:
    num_pages = NUM_SLOTS // 4 * PAGES_OF_ONE
    server = start_server(
        *("--kv-backend", backend, "--max-num-seqs", str(NUM_SLOTS), "--batch-invariant"),
        *("--kv-cache-memory-bytes", str(num_pages * PAGE_BYTES), "--page-size", str(PAGE_BYTES)),
        *("--admin-api-key", "k"),
    )
    alone = []
    for idx in range(NUM_PROMPTS):
        answer = server.complete(**body_of(idx))
        assert answer["usage"]["completion_tokens"] == NUM_TOKENS
        alone.append(answer["choices"][0]["text"])
    assert server.metric("vmalloc_preemptions_total") == 0

    async def read_all() -> list[tuple[str, str | None]]:
        limits = httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_SECONDS, limits=limits)
        async with client:
            return await asyncio.gather(*(read_stream(client, idx) for idx in range(NUM_STREAMS)))

    written = asyncio.run(read_all())
    assert written == [(alone[idx % NUM_PROMPTS], "length") for idx in range(NUM_STREAMS)]
    num_preemptions = server.metric("vmalloc_preemptions_total")
    assert num_preemptions > 0
    assert server.metric("vllm:num_preemptions_total") == num_preemptions
    assert server.metric("vmalloc_kv_capacity_bytes") == num_pages * PAGE_BYTES
    assert 0 < server.metric("vmalloc_kv_peak_committed_bytes") <= num_pages * PAGE_BYTES
    assert server.metric("vllm:request_success_total", finished_reason="length") == (
        NUM_STREAMS + NUM_PROMPTS
    )
    server.wait_idle()
    response = server.http.post("/admin/prefix-cache/flush", headers={"authorization": "Bearer k"})
    assert response.status_code == 200
    for name in ("in_use_pages", "cached_bytes", "live_bytes", "retired_pages", "swapped_bytes"):
        assert server.metric(f"vmalloc_kv_{name}") == 0, name
    assert server.complete(**body_of(0))["choices"][0]["text"] == alone[0]


def test_a_storm_of_clients_that_vanish(start_server: Callable[..., ServerProcess]) -> None:
    """Streams and plain requests, with RST and FIN, before and after the first event."""
    server = start_server("--max-num-seqs", "48", "--batch-invariant")
    expected = server.text("import ", max_tokens=400)
    num_steps_of_one = server.metric("vmalloc_engine_steps_total")
    survivor = Stream(server, "import ", max_tokens=400)
    survivor.wait_text()
    socks = [_send(server, idx, is_streamed=idx % 4 != 0) for idx in range(100)]
    for idx, sock in enumerate(socks):
        if idx % 4 == 1:
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        if idx % 3 == 0:
            # Closing sends RST instead of FIN.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    num_steps = server.metric("vmalloc_engine_steps_total")
    server._wait_until(lambda: server.metric("vmalloc_live_requests") <= 1, "they are gone")
    server._wait_until(
        lambda: (
            server.metric("vmalloc_running_sequences") <= 1
            and server.metric("vllm:num_requests_waiting") == 0
        ),
        "none of them runs",
    )
    # Far fewer than the 1,900 that each wanted, and a step of 48 sequences takes some 20 ms.
    assert server.metric("vmalloc_engine_steps_total") - num_steps < 100
    assert survivor.join().text == expected
    server.wait_idle()
    assert num_steps_of_one >= 300  # the text may end by itself before its 400 tokens
    assert server.metric("vmalloc_requests_aborted_total", reason="disconnect") > 0
    assert server.text("import ", max_tokens=400) == expected


def _send(server: ServerProcess, idx: int, *, is_streamed: bool) -> socket.socket:
    body = json.dumps(
        {
            "prompt": [3 + idx, 5, 7],
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": is_streamed,
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    sock = server.connect()
    sock.sendall(head.encode() + body)
    return sock


def test_a_full_queue_turns_requests_away(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(
        *("--max-num-seqs", "2", "--max-num-queued-reqs", "3", "--queue-timeout", "100")
    )
    expected = server.text(max_tokens=300)
    running = [Stream(server, max_tokens=300) for _ in range(2)]
    for stream in running:
        stream.wait_text()
    queued = [Stream(server, max_tokens=300) for _ in range(3)]
    server._wait_until(lambda: server.metric("vmalloc_queue_length") == 3, "the queue is full")
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = server.post(path, **body)
        error = assert_error(response, 429, "queue_full")
        assert error["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
    assert server.metric("vllm:admission_rejections_total") == 3
    for stream in [*running, *queued]:
        stream.join()
        assert (stream.text, stream.is_done, stream.error) == (expected, True, None)
    too_many = server.post("/v1/completions", prompt=["x"] * 4)
    assert_error(too_many, 400)
    server.wait_idle()


def test_a_client_that_never_reads_stops_nobody(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(
        "--max-num-seqs", "4", "--shutdown-timeout", "60", prepare=small_send_buffers
    )
    expected = server.text(max_tokens=200)
    deaf = []
    for idx in range(2):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(DEADLINE_SECONDS)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(_request(idx))
        deaf.append(sock)
    server._wait_until(lambda: server.metric("vmalloc_live_requests") == 2, "they are heard")
    assert Stream(server, max_tokens=200).join().text == expected
    # Their answers are made, and wait for them.
    server._wait_until(lambda: server.metric("vmalloc_live_requests") == 0, "they are answered")
    assert server.http.get("/health").status_code == 200
    assert server.end() == 0
    for sock in deaf:
        sock.close()


def _request(idx: int) -> bytes:
    body = json.dumps(
        {"prompt": [3 + idx], "max_tokens": 600, "ignore_eos": True, "stream": True, "logprobs": 5}
    )
    return (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()

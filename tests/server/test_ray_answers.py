"""Answers on their way: through an application, held back or sent on, and merged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from vmalloc.server.errors import ApiError
from vmalloc.server.ray.exchange import Exchange
from vmalloc.server.ray.messages import Headers, ReplicaRequest, ReplyHead
from vmalloc.server.ray.metrics_merge import merge_metrics
from vmalloc.server.ray.page_map_merge import merge_frames
from vmalloc.server.ray.reply_writer import ReplyWriter

STREAM: Headers = ((b"content-type", b"text/event-stream; charset=utf-8"),)
JSON: Headers = ((b"content-type", b"application/json"),)
EVENT = b'data: {"a": 1}\n\n'


def request(path: str = "/v1/completions", body: bytes = b"{}") -> ReplicaRequest:
    return ReplicaRequest("POST", path, b"", JSON, body, "http", ("127.0.0.1", 1), None)


class Client:
    """What a client got."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.is_over = False

    async def send(self, message: Message) -> None:
        assert not self.is_over
        if message["type"] == "http.response.start":
            assert self.status == 0
            self.status, self.headers = message["status"], message["headers"]
        else:
            assert self.status
            self.body += message["body"]
            self.is_over = not message["more_body"]


@pytest.fixture
def client() -> Client:
    return Client()


class TestWriter:
    def test_a_whole_answer_is_held_back_until_it_is_there(self, client: Client) -> None:
        async def run() -> None:
            writer = ReplyWriter(client.send, "/v1/completions")
            writer.add_head(ReplyHead(200, (*JSON, (b"x-request-id", b"1"))), "one")
            await writer.add_body(b'{"half":')
            assert client.status == 0
            assert not writer.has_started
            writer.restart()
            writer.add_head(ReplyHead(200, JSON), "two")
            await writer.add_body(b"{}")
            await writer.finish()

        asyncio.run(run())
        assert (client.status, client.body, client.is_over) == (200, b"{}", True)
        assert client.headers == [*JSON, (b"x-vmalloc-replica", b"two")]

    def test_comments_start_nothing_and_another_one_goes_on(self, client: Client) -> None:
        async def run() -> None:
            writer = ReplyWriter(client.send, "/v1/completions")
            writer.add_head(ReplyHead(200, STREAM), "one")
            await writer.add_body(b": keep-alive\n\n")
            assert client.status == 200
            assert not writer.has_started
            writer.restart()
            writer.add_head(ReplyHead(200, STREAM), "two")
            await writer.add_body(EVENT)
            assert writer.has_started
            await writer.finish()

        asyncio.run(run())
        assert client.body == b": keep-alive\n\n" + EVENT

    def test_a_refusal_after_a_promised_stream_is_an_event(self, client: Client) -> None:
        refusal = ApiError(503, "no", code="engine_dead")

        async def run() -> None:
            writer = ReplyWriter(client.send, "/v1/completions")
            writer.add_head(ReplyHead(200, STREAM), "one")
            await writer.add_body(b": keep-alive\n\n")
            writer.restart()
            writer.add_head(ReplyHead(503, JSON), "two")
            await writer.add_body(refusal.encode())
            assert writer.is_refusal
            await writer.finish()

        asyncio.run(run())
        _, event, done, _ = client.body.split(b"\n\n")
        assert json.loads(event.removeprefix(b"data: ")) == refusal.body()
        assert done == b"data: [DONE]"

    @pytest.mark.parametrize(
        ("status", "code", "is_refusal"),
        [
            (429, "queue_full", True),
            (503, "engine_dead", True),
            (503, "queue_timeout", False),
            (400, "engine_dead", False),
        ],
    )
    def test_refusals_are_told_from_errors(
        self, client: Client, status: int, code: str, is_refusal: bool
    ) -> None:
        async def run() -> bool:
            writer = ReplyWriter(client.send, "/v1/completions")
            writer.add_head(ReplyHead(status, JSON), "one")
            await writer.add_body(ApiError(status, "no", code=code).encode())
            return writer.is_refusal

        assert asyncio.run(run()) is is_refusal

    def test_a_started_stream_fails_in_the_words_of_its_endpoint(self) -> None:
        error = ApiError(503, "gone", code="replica_lost")

        def fail(path: str) -> bytes:
            client = Client()

            async def run() -> None:
                writer = ReplyWriter(client.send, path)
                writer.add_head(ReplyHead(200, STREAM), "one")
                await writer.add_body(EVENT + EVENT)
                await writer.fail(error)

            asyncio.run(run())
            assert client.is_over
            return client.body.removeprefix(EVENT + EVENT)

        assert fail("/v1/completions").endswith(b"data: [DONE]\n\n")
        kind, _, data = fail("/v1/responses").partition(b"\n")
        assert kind == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["sequence_number"] == 2

    def test_before_its_start_it_fails_with_a_status(self, client: Client) -> None:
        async def run() -> None:
            writer = ReplyWriter(client.send, "/v1/completions")
            await writer.fail(ApiError(503, "none", headers={"retry-after": "1"}))

        asyncio.run(run())
        assert client.status == 503
        assert (b"retry-after", b"1") in client.headers
        assert json.loads(client.body)["error"]["message"] == "none"


class TestExchange:
    def test_the_answer_comes_in_order(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = (await receive())["body"]
            await send({"type": "http.response.start", "status": 201, "headers": JSON})
            for chunk in (b"a", b"b", body):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def run() -> list[Any]:
            return [part async for part in Exchange(app, request(body=b"c")).parts()]

        head, *chunks = asyncio.run(run())
        assert head == ReplyHead(201, JSON)
        assert b"".join(chunks) == b"abc"

    def test_closing_it_tells_the_application(self) -> None:
        seen: list[str] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            seen.append((await receive())["type"])

        async def run() -> None:
            parts = Exchange(app, request()).parts()
            assert isinstance(await anext(parts), ReplyHead)
            await parts.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

        asyncio.run(run())
        assert seen == ["http.disconnect"]

    def test_what_it_raises_is_raised(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise LookupError("ours")

        async def run() -> None:
            async for _ in Exchange(app, request()).parts():
                pass

        with pytest.raises(LookupError, match="ours"):
            asyncio.run(run())


def test_metrics_stand_together_and_name_their_replica() -> None:
    head = ["# HELP a_total Help: of it", "# TYPE a_total counter"]
    second = ["# HELP b The other", "# TYPE b histogram"]
    page = "\n".join(
        [*head, 'a_total{x="1"} 2.0', *second, 'b_bucket{le="+Inf"} 1', "b_sum 0.5", ""]
    )
    merged = merge_metrics({"one": page, "two": page}).splitlines()
    assert merged == [
        *head,
        'a_total{x="1",replica="one"} 2.0',
        'a_total{x="1",replica="two"} 2.0',
        *second,
        'b_bucket{le="+Inf",replica="one"} 1',
        'b_sum{replica="one"} 0.5',
        'b_bucket{le="+Inf",replica="two"} 1',
        'b_sum{replica="two"} 0.5',
    ]


def test_page_maps_stand_side_by_side(make_frame: Callable[..., dict[str, Any]]) -> None:
    one, two = make_frame(slot_idx=3, committed=10), make_frame(slot_idx=0, committed=5)
    merged = merge_frames([one, two])
    assert [slot["slot_idx"] for slot in merged["map"]["slots"]] == [3, 8]
    assert merged["map"]["num_slots"] == 16
    assert merged["totals"]["committed_bytes"] == 15
    assert merged["map"]["page_bytes"] == 4096
    assert merged["model"] == "demo"


def test_a_rank_is_that_rank_of_all_replicas(make_frame: Callable[..., dict[str, Any]]) -> None:
    frames = []
    for committed in (10, 5):
        whole = make_frame(slot_idx=1, committed=2 * committed)
        parts = [make_frame(slot_idx=1, committed=committed) for _ in range(2)]
        whole["ranks"] = [
            {"rank": rank, "peak_rss_bytes": committed, **part} for rank, part in enumerate(parts)
        ]
        frames.append(whole)
    merged = merge_frames(frames)
    assert [one["rank"] for one in merged["ranks"]] == [0, 1]
    assert merged["totals"]["committed_bytes"] == 30
    for one in merged["ranks"]:
        assert one["totals"]["committed_bytes"] == 15
        assert [slot["slot_idx"] for slot in one["map"]["slots"]] == [1, 9]
        assert one["map"]["num_slots"] == merged["map"]["num_slots"]
        assert one["peak_rss_bytes"] == 10


@pytest.fixture
def make_frame() -> Callable[..., dict[str, Any]]:
    def make(slot_idx: int, committed: int) -> dict[str, Any]:
        counts = {"num_slots": 8, "shared_refs": 1, "held_pages": 2, "cached_pages": 3}
        page_map: dict[str, Any] = {"page_bytes": 4096, "is_asleep": False, **counts}
        slots = [{"slot_idx": slot_idx, "runs": []}]
        totals = {"committed_bytes": committed, "tokens_per_s": 1.5}
        page_map["slots"] = slots
        return {"time": 1.0, "model": "demo", "map": page_map, "totals": totals, "ranks": []}

    return make

"""2,000 bodies that are wrong in every way there is: each is refused, and harms nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.process import DEADLINE_SECONDS, ServerProcess, assert_error

NUM_BODIES = 2000
NUM_LONG = 20
JSON = {"content-type": "application/json"}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/abort": {"request_id": "nobody"},
    "/admin/resize": {"kv_cache_memory_bytes": 10**8},
    "/admin/prefix-cache/pin": {"prompt": "x"},
    "/admin/prefix-cache/unpin": {"prompt": "x"},
}
# No field of any endpoint takes one of these.
WRONG: list[Any] = [
    {"no": {"such": "thing"}},
    [[[]]],
    [None],
    [{"a": 1}, True],
    10**30,
    -(10**30),
    1e308,
    "\ud800",
    [10**20],
    [-1],
    {"": ""},
]
Body = tuple[str, bytes, dict[str, str]]


def wrong_type(rng: random.Random, path: str) -> Body:
    """A field that must be there holds what it never may."""
    body = dict(GOOD[path])
    body[next(iter(GOOD[path]))] = rng.choice(WRONG)
    return path, json.dumps(body).encode(), JSON


def unknown_field(rng: random.Random, path: str) -> Body:
    name = "".join(rng.choices("abc_é\u2028\ud83d" + '"\\', k=rng.randint(1, 300)))
    return path, json.dumps({**GOOD[path], f"no_{name}": rng.choice(WRONG)}).encode(), JSON


def missing_field(rng: random.Random, path: str) -> Body:
    body = dict(GOOD[path])
    del body[next(iter(body))]
    return path, json.dumps(body).encode(), JSON


def no_object(rng: random.Random, path: str) -> Body:
    value = rng.choice([None, True, 0, -1.5, "x", [], [{}], [GOOD[path]], json.dumps(GOOD[path])])
    return path, json.dumps(value).encode(), JSON


def truncated(rng: random.Random, path: str) -> Body:
    body = json.dumps(GOOD[path]).encode()
    return path, body[: rng.randrange(len(body))], JSON


def trailing(rng: random.Random, path: str) -> Body:
    body = json.dumps(GOOD[path]).encode()
    return path, body + rng.choice([b"}", b",", b"{}", b"\x00", b"null", b"]"]), JSON


def bad_utf8(rng: random.Random, path: str) -> Body:
    body = bytearray(json.dumps(GOOD[path]).encode())
    at = rng.randrange(len(body))
    body[at:at] = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    return path, bytes(body), JSON


def other_encoding(rng: random.Random, path: str) -> Body:
    encoding = rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-8-sig", "cp037"])
    return path, json.dumps(GOOD[path]).encode(encoding), JSON


def deep(rng: random.Random, path: str) -> Body:
    depth = rng.choice([50, 500, 900, 5000, 100_000])
    name = next(iter(GOOD[path]))
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    value = opening * depth + ("1" if opening != "[" else "") + closing * depth
    return path, f'{{"{name}": {value}}}'.encode(), JSON


def deep_schema(rng: random.Random, path: str) -> Body:
    """Nested where any JSON is allowed; wrong only at the bottom."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    depth = rng.choice([10, 100, 400])
    schema: dict[str, Any] = {"type": "no such type"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return path, json.dumps({**GOOD[path], "guided_json": schema}).encode(), JSON


def huge_number(rng: random.Random, path: str) -> Body:
    number = rng.choice(
        ["9" * 5000, "1e400", "-1e400", "1" * 310, "-0." + "9" * 4000, "-" + "8" * 40]
    )
    name = rng.choice(["temperature", "max_tokens", "seed", "n", next(iter(GOOD[path]))])
    others = {key: value for key, value in GOOD[path].items() if key != name}
    text = json.dumps({**others, name: "number"}).replace('"number"', number)
    return path, text.encode(), JSON


def no_number(rng: random.Random, path: str) -> Body:
    body = {**GOOD[path], rng.choice(["temperature", "metadata", "x"]): float("nan")}
    text = json.dumps(body).replace(
        "NaN", rng.choice(["NaN", "Infinity", "-Infinity", "nan", "+1"])
    )
    return path, text.encode(), JSON


def twice(rng: random.Random, path: str) -> Body:
    text = json.dumps(GOOD[path])
    return path, (text[:-1] + ", " + text[1:]).encode(), JSON


def surrogate(rng: random.Random, path: str) -> Body:
    body = json.dumps(GOOD[path]).replace('"x"', '"\\ud800 x"').replace("[5]", '["\\udfff"]')
    body = body.replace('"nobody"', '"\\udc00"').replace("100000000", '"\\udc00"')
    return path, body.encode(), JSON


def content_type(rng: random.Random, path: str) -> Body:
    kind = rng.choice(
        [
            *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"),
            *("", "x", "json", "application/xml", "application/octet-stream", "application"),
            *(";", "application/jsonx"),
        ]
    )
    return path, json.dumps(GOOD[path]).encode(), {"content-type": kind}


def content_encoding(rng: random.Random, path: str) -> Body:
    kind = rng.choice(["gzip", "deflate", "br", "zstd", "identity, gzip", "x"])
    return path, json.dumps(GOOD[path]).encode(), {**JSON, "content-encoding": kind}


def noise(rng: random.Random, path: str) -> Body:
    return path, rng.randbytes(rng.randint(0, 300)), JSON


def long(rng: random.Random, path: str) -> Body:
    """10 MB, most of it of no use."""
    filler = rng.choice([b" ", b"[", b'"', b"\xff", b"0"])
    return path, b'{"prompt": ' + filler * 10_000_000, JSON


KINDS: list[Callable[[random.Random, str], Body]] = [
    *(wrong_type, unknown_field, missing_field, no_object, truncated, trailing, bad_utf8),
    *(other_encoding, deep, deep_schema, huge_number, no_number, twice, surrogate),
    *(content_type, content_encoding, noise),
]


def bodies() -> list[tuple[str, Body]]:
    rng = random.Random(11)
    made = []
    for idx in range(NUM_BODIES - NUM_LONG):
        kind = KINDS[idx % len(KINDS)]
        made.append((kind.__name__, kind(rng, rng.choice(list(GOOD)))))
    made += [("long", long(rng, rng.choice(list(GOOD)))) for _ in range(NUM_LONG)]
    rng.shuffle(made)
    return made


async def dribble(server: ServerProcess, idx: int) -> None:
    """A sender that never ends, meanwhile."""
    path = list(GOOD)[idx % len(GOOD)]
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: 100000\r\n\r\n{")
    try:
        while True:
            await asyncio.sleep(0.05)
            writer.write(b" ")
            await writer.drain()
    finally:
        writer.close()


def test_two_thousand_malformed_bodies(shared_server: ServerProcess) -> None:
    server = shared_server
    expected = server.complete("class Stack:", n=2, max_tokens=20, seed=3, temperature=0.7)
    admin = {"authorization": "Bearer admin-key"}

    async def send_all() -> list[tuple[str, Body, httpx.Response]]:
        limits = httpx.Limits(max_connections=16)
        todo = bodies()
        results = []
        slow = [asyncio.create_task(dribble(server, idx)) for idx in range(4)]
        async with httpx.AsyncClient(
            base_url=server.url, timeout=DEADLINE_SECONDS, limits=limits
        ) as client:

            async def work() -> None:
                while todo:
                    kind, body = todo.pop()
                    path, content, headers = body
                    response = await client.post(
                        path, content=content, headers={**admin, **headers}
                    )
                    results.append((kind, body, response))

            await asyncio.gather(*(work() for _ in range(16)))
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return results

    results = asyncio.run(send_all())
    assert len(results) == NUM_BODIES
    taken = [
        (kind, path, content[:300], headers, response.status_code, response.text[:300])
        for kind, (path, content, headers), response in results
        if not 400 <= response.status_code < 500
    ]
    assert not taken, taken[:10]
    for _, _, response in results:
        error = assert_error(response, response.status_code)
        assert len(error["message"]) < 1100
    server.wait_idle()
    again = server.complete("class Stack:", n=2, max_tokens=20, seed=3, temperature=0.7)
    assert again["choices"] == expected["choices"]
    # Nothing was pinned, and the cap is where it was.
    assert server.metric("vmalloc_prefix_pinned_pages") == 0
    assert server.metric("vmalloc_kv_capacity_bytes") == 64 << 20


@pytest.mark.parametrize("path", list(GOOD))
def test_what_they_were_made_of_is_good(path: str, shared_server: ServerProcess) -> None:
    """Or else the fuzz would prove nothing."""
    if path.startswith("/admin/resize"):
        body: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20}
    else:
        body = GOOD[path]
    headers = {"authorization": "Bearer admin-key"}
    response = shared_server.http.post(path, json=body, headers=headers)
    assert response.status_code == (404 if path == "/abort" else 200), response.text
    if path.endswith("/pin"):
        shared_server.http.post(path.replace("/pin", "/unpin"), json=body, headers=headers)

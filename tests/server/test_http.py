"""Who may come in, and what is said to whom: keys, ids, origins, heads and bodies."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

import vmalloc.server.connection as connection
from tests.server.app_thread import AppThread, make_state
from tests.server.process import ServerProcess, assert_error
from vmalloc.engine import LLMEngine, StartupPhases, load_engine

OPEN = ["/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs"]


@pytest.fixture(scope="module")
def guarded() -> Iterator[AppThread]:
    """A server with keys, that lets one origin in and waits for nobody."""
    state = make_state(
        api_keys=("first", "sécond"),
        admin_api_keys=("admin",),
        allowed_origins=("https://friend.example",),
        max_body_bytes=10_000,
        body_timeout_s=0.5,
    )
    with AppThread(state) as server:
        yield server


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": f"Bearer {key}".encode()}


def paths(server: AppThread) -> list[tuple[str, str]]:
    """Every operation of the API description."""
    document = server.http.get("/openapi.json").json()
    return [
        (method.upper(), re.sub(r"\{.*?\}", "x", path))
        for path, operations in document["paths"].items()
        for method in operations
    ]


def ask(sock: socket.socket, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; status, headers and body of what comes back."""
    sock.sendall(data)
    return read_response(sock)


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    reader = sock.makefile("rb")
    status = int(reader.readline().split()[1])
    headers: dict[str, str] = {}
    while (line := reader.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, reader.read(int(headers["content-length"]))


def assert_raw_error(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> None:
    found, headers, body = answer
    assert found == status, body
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


class TestKeys:
    def test_every_path_but_the_open_ones_asks_for_one(self, guarded: AppThread) -> None:
        closed = [(method, path) for method, path in paths(guarded) if path not in OPEN]
        assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/abort"} <= {
            path for _, path in closed
        }
        closed += [("GET", "/nowhere"), ("OPTIONS", "/v1/models"), ("DELETE", "/v1/completions")]
        for method, path in closed:
            for headers in (
                {},
                bearer("wrong"),
                {"authorization": b"Bearer"},
                bearer("firs"),
                bearer("firstfirst"),
                {"authorization": b"first"},
                {"authorization": b"Basic first"},
                {"authorization": b"Bearer \xff\xfe"},
                {"x-api-key": b"first"},
            ):
                response = guarded.http.request(method, path, headers=headers)
                error = assert_error(response, 401, "invalid_api_key")
                assert error["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"

    def test_open_paths_do_not(self, guarded: AppThread) -> None:
        for path in OPEN:
            assert guarded.http.get(path).status_code == 200

    @pytest.mark.parametrize("key", ["first", "sécond", "admin"])
    def test_a_right_one_opens(self, key: str, guarded: AppThread) -> None:
        response = guarded.http.get("/v1/models", headers=bearer(key))
        assert response.status_code == 200
        lower = {"authorization": f"bearer  {key}".encode()}
        assert guarded.http.get("/v1/models", headers=lower).status_code == 200

    def test_the_administration_has_its_own(self, guarded: AppThread) -> None:
        for key in ("first", "sécond", "wrong"):
            for path in ("/admin/wake", "/admin", "/admin/nowhere"):
                response = guarded.http.post(path, headers=bearer(key))
                assert_error(response, 401, "invalid_api_key")
        response = guarded.http.post("/admin/wake", headers=bearer("admin"))
        assert response.status_code == 200

    def test_the_administration_is_shut_without_keys(self) -> None:
        with AppThread(make_state(), waits=False) as server:
            response = server.http.post("/admin/sleep", headers=bearer("x"))
            error = assert_error(response, 403, "admin_disabled")
            assert "--admin-api-key" in error["message"]

    def test_without_admin_keys_the_api_keys_administer(self) -> None:
        with AppThread(make_state(api_keys=("user",))) as server:
            assert_error(server.http.post("/admin/wake"), 401)
            assert server.http.post("/admin/wake", headers=bearer("user")).status_code == 200

    def test_under_a_root_path_the_same_holds(self) -> None:
        state = make_state(api_keys=("user",), admin_api_keys=("admin",), root_path="/llm")
        with AppThread(state, waits=False) as server:
            for prefix in ("", "/llm"):
                assert_error(server.http.get(f"{prefix}/v1/models"), 401)
                path = f"{prefix}/admin/wake"
                assert_error(server.http.post(path, headers=bearer("user")), 401)
                assert server.http.get(f"{prefix}/health").status_code == 503
                models = server.http.get(f"{prefix}/v1/models", headers=bearer("user"))
                assert models.status_code == 200


class TestShapes:
    @pytest.mark.parametrize(
        "path",
        ["/nowhere", "/v1", "/v1/completions/", "//v1/models", "/v1/%ff%00", "/v1/models/no"],
    )
    def test_unknown_paths(self, path: str, shared_server: ServerProcess) -> None:
        assert_error(shared_server.http.get(path), 404)

    def test_unknown_methods(self, shared_server: ServerProcess) -> None:
        for method, path in (
            ("GET", "/v1/completions"),
            ("DELETE", "/v1/models"),
            ("PUT", "/health"),
            ("PATCH", "/abort"),
            ("OPTIONS", "/v1/chat/completions"),
        ):
            response = shared_server.http.request(method, path)
            assert_error(response, 405, "method_not_allowed")
            assert response.headers["allow"]

    def test_a_failure_of_ours_is_told_as_one_with_its_request_id(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Faulty(LLMEngine):
            def resize_kv_cache(self, num_bytes: int) -> None:
                raise RuntimeError("secret detail")

        def load(phases: StartupPhases) -> LLMEngine:
            engine = load_engine("demo", phases=phases)
            engine.__class__ = Faulty
            return engine

        with AppThread(make_state(load, admin_api_keys=("k",))) as server:
            headers = {**bearer("k"), "x-request-id": b"mine"}
            body = {"kv_cache_memory_bytes": 10**7}
            response = server.http.post("/admin/resize", headers=headers, json=body)
            error = assert_error(response, 500, "internal_error")
            assert "secret" not in error["message"]
            assert response.headers["x-request-id"] == "mine"
            assert server.http.post("/admin/wake", headers=headers).status_code == 200
        assert "secret detail" in caplog.text


class TestRequestIds:
    def test_a_name_is_echoed_and_else_made(self, shared_server: ServerProcess) -> None:
        mine = {"x-request-id": "mine-1/2:3"}
        for path in ("/health", "/nowhere", "/v1/models"):
            assert (
                shared_server.http.get(path, headers=mine).headers["x-request-id"] == "mine-1/2:3"
            )
        made = {shared_server.http.get("/health").headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3

    @pytest.mark.parametrize("name", [b"with space", b"x" * 129, b"", b"\xe4", b"tab\there"])
    def test_what_is_no_name_is_replaced(self, name: bytes, shared_server: ServerProcess) -> None:
        given = {"x-request-id": name}
        answered = shared_server.http.get("/health", headers=given).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", answered)

    def test_refusals_carry_it(self, guarded: AppThread) -> None:
        response = guarded.http.get("/v1/models", headers={"x-request-id": "mine"})
        assert (response.status_code, response.headers["x-request-id"]) == (401, "mine")


class TestOrigins:
    PREFLIGHT: ClassVar = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }

    def test_off_unless_asked(self, shared_server: ServerProcess) -> None:
        headers = {"origin": "https://friend.example"}
        for response in (
            shared_server.http.get("/v1/models", headers=headers),
            shared_server.http.options("/v1/models", headers={**headers, **self.PREFLIGHT}),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]

    def test_only_who_was_named(self, guarded: AppThread) -> None:
        friend = {"origin": "https://friend.example"}
        response = guarded.http.get("/v1/models", headers={**friend, **bearer("first")})
        assert response.headers["access-control-allow-origin"] == "https://friend.example"
        # A page may read why it was refused.
        response = guarded.http.get("/v1/models", headers=friend)
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://friend.example"
        preflight = guarded.http.options("/v1/completions", headers={**friend, **self.PREFLIGHT})
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        stranger = {"origin": "https://stranger.example", **bearer("first")}
        response = guarded.http.get("/v1/models", headers=stranger)
        assert "access-control-allow-origin" not in response.headers


class TestBodies:
    JSON: ClassVar = {"content-type": "application/json"}

    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
    def test_ten_megabytes_are_too_long(
        self, path: str, is_chunked: bool, shared_server: ServerProcess
    ) -> None:
        body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(body), 65536):
                yield body[start : start + 65536]

        content: Any = chunks() if is_chunked else body
        for _ in range(2):  # on one connection
            response = shared_server.http.post(path, content=content, headers=self.JSON)
            assert_error(response, 413, "body_too_large")
            content = body
        assert shared_server.http.get("/health").status_code == 200

    @pytest.mark.parametrize("length", ["99999999", "9" * 20, "000099999999"])
    def test_a_declared_length_is_believed(self, length: str, shared_server: ServerProcess) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
        with shared_server.connect() as sock:
            assert_raw_error(ask(sock, head.encode()), 413, "body_too_large")

    def test_one_byte_less_than_the_limit_is_read(self, guarded: AppThread) -> None:
        headers = {**bearer("first"), **self.JSON}
        for size, status in ((10_000, 400), (10_001, 413)):
            body = b'{"no_such": "' + b"x" * (size - 15) + b'"}'
            assert len(body) == size
            response = guarded.http.post("/v1/completions", content=body, headers=headers)
            assert response.status_code == status

    @pytest.mark.parametrize("dribbles", [False, True])
    def test_one_that_does_not_come_is_given_up(self, dribbles: bool, guarded: AppThread) -> None:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer first\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
        )
        with guarded.connect() as sock:
            sock.sendall(head)
            if dribbles:
                for _ in range(20):
                    time.sleep(0.01)
                    sock.sendall(b" ")
            answer = read_response(sock)
            assert_raw_error(answer, 408, "body_timeout")
            assert answer[1]["connection"] == "close"

    @pytest.mark.parametrize("encoding", ["gzip", "br", "x" * 500])
    def test_a_compressed_one_is_refused(self, encoding: str, shared_server: ServerProcess) -> None:
        headers = {**self.JSON, "content-encoding": encoding}
        response = shared_server.http.post("/v1/completions", content=b"..", headers=headers)
        assert_error(response, 415, "unsupported_content_encoding")

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b'{"prompt": "x", "prompt": "y"}', "the key 'prompt' comes twice"),
            (b'{"prompt": "x", "metadata": {"a": 1, "a": 2}}', "the key 'a' comes twice"),
            (b'{"prompt": "x", "temperature": NaN}', "NaN is no JSON"),
            (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is no JSON"),
            (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
            ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
            (b"\xef\xbb\xbf{}", "BOM"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"max_tokens": ' + b"9" * 5000 + b"}", "digits"),
            (b"{", "Expecting"),
            (b"\x00", "Expecting"),
        ],
    )
    def test_what_is_no_json_is_said_so(
        self, body: bytes, reason: str, shared_server: ServerProcess
    ) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/abort"):
            response = shared_server.http.post(path, content=body, headers=self.JSON)
            error = assert_error(response, 400, "invalid_json")
            assert reason in error["message"]


def test_every_route_with_a_body_reads_strict_json(guarded: AppThread) -> None:
    document = guarded.http.get("/openapi.json").json()
    headers = {**bearer("admin"), "content-type": "application/json"}
    with_body = [
        path
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    ]
    assert "/v1/completions" in with_body
    for path in with_body:
        response = guarded.http.post(path, content=b'{"a": 1, "a": 2}', headers=headers)
        error = assert_error(response, 400, "invalid_json")
        assert "comes twice" in error["message"]


class TestHeads:
    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\nbad\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        ],
    )
    def test_what_is_no_http_is_refused(self, data: bytes, shared_server: ServerProcess) -> None:
        with shared_server.connect() as sock:
            assert_raw_error(ask(sock, data), 400, "invalid_http")
            assert sock.recv(1) == b""

    def test_one_that_is_too_long(self, shared_server: ServerProcess) -> None:
        with shared_server.connect() as sock:
            answer = ask(sock, b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 70_000)
            assert_raw_error(answer, 431, "head_too_large")

    def test_one_that_does_not_come(
        self, guarded: AppThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
        with guarded.connect() as sock:
            assert sock.recv(1) == b""  # it never said a word
        for first in (b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"):
            with guarded.connect() as sock:
                if first:
                    assert ask(sock, first)[0] == 200
                answer = ask(sock, b"GET /health HTTP/1.1\r\nhost")
                assert_raw_error(answer, 408, "head_timeout")
                assert sock.recv(1) == b""
        # Who is slow, but in time, is served.
        monkeypatch.setattr(connection, "HEAD_SECONDS", 30.0)
        with guarded.connect() as sock:
            for byte in b"GET /health HTTP/1.1\r\nhost: x\r\n":
                sock.sendall(bytes([byte]))
                time.sleep(0.001)
            assert ask(sock, b"\r\n")[0] == 200

    def test_garbage_after_an_answer_closes_the_connection(
        self, shared_server: ServerProcess
    ) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        with shared_server.connect() as sock:
            assert_raw_error(ask(sock, head + b"zz\r\n"), 400, "invalid_http")
        with shared_server.connect() as sock:
            head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999\r\n\r\n"
            assert ask(sock, head)[0] == 413
            sock.sendall(b"x" * 100)

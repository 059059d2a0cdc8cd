"""A server from its start to its end, and what it says to whoever comes at the wrong time."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.app_thread import AppThread, make_state
from tests.server.faults import fail_every_step, load_for_ever
from tests.server.process import REPOSITORY, ServerProcess, assert_error, wait_until
from vmalloc.engine import LLMEngine, StartupPhases, load_engine

EXIT_BAD_INPUT = 2


class TestStart:
    def test_it_answers_while_it_loads(self) -> None:
        may_load = threading.Event()

        def load(phases: StartupPhases) -> LLMEngine:
            with phases.phase("wait for a sign"):
                assert may_load.wait(60)
            return load_engine("demo", phases=phases)

        with AppThread(make_state(load, admin_api_keys=("k",)), waits=False) as server:
            for path in ("/health", "/ready"):
                response = server.http.get(path)
                assert response.status_code == 503
                assert response.json()["status"] == "starting"
                assert response.json()["startup_phase"] == "wait for a sign"
            assert response.headers["retry-after"] == "1"
            for path, body in (
                ("/v1/completions", {"prompt": "x"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                ("/tokenize", {"prompt": "x"}),
            ):
                response = server.http.post(path, json=body)
                assert_error(response, 503, "engine_starting")
                assert response.headers["retry-after"] == "1"
            assert server.http.get("/v1/models").json()["data"][0]["id"] == "demo"
            may_load.set()
            server.wait_started()
            health = server.http.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "ok")
            assert health.json()["startup_phase"] is None
            assert server.http.get("/ready").status_code == 200
            assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200

    @pytest.mark.parametrize(
        ("flags", "text"),
        [
            (["--model", "/nowhere/model"], "/nowhere/model"),
            (["--kv-cache-memory-bytes", "1"], "the cap holds 0 pages"),
            (["--port", "99999"], "99999"),
            (["--chat-template", "/nowhere/template"], "/nowhere/template"),
            (["--ssl-certfile", str(REPOSITORY / "README.md")], "ssl_keyfile"),
            (["--no-such-flag"], "--no-such-flag"),
        ],
    )
    def test_what_cannot_work_is_said_and_the_exit_code_tells(
        self, flags: list[str], text: str, start_server: Callable[..., ServerProcess]
    ) -> None:
        server = start_server(*flags, waits=False)
        assert server.process.wait(60) == EXIT_BAD_INPUT
        assert text in server.log
        assert "Traceback" not in server.log

    def test_a_taken_port_is_named_before_anything_is_loaded(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            server = start_server("--port", port, waits=False)
            assert server.process.wait(60) == EXIT_BAD_INPUT
        assert f"port is {port}" in server.log
        assert "Address already in use" in server.log
        assert "load weights" not in server.log

    def test_sigterm_while_it_loads_ends_it(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        server = start_server(waits=False, prepare=load_for_ever)
        response = server.http.get("/health")
        assert (response.status_code, response.json()["startup_phase"]) == (503, "load weights")
        assert server.end() == 0

    def test_two_signals_while_it_loads_end_it(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        server = start_server(waits=False, prepare=load_for_ever)
        assert server.http.get("/ready").status_code == 503
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) in (0, 1)
        assert "Traceback" not in server.log


class TestUnixSocket:
    def test_it_serves_there_and_leaves_nothing(
        self, tmp_path: Path, start_server: Callable[..., ServerProcess]
    ) -> None:
        path = tmp_path / "socket"
        server = start_server("--uds", str(path))
        assert server.text()
        # A second one is refused, and does no harm to the first.
        second = start_server("--uds", str(path), waits=False)
        assert second.process.wait(60) == EXIT_BAD_INPUT
        assert "a server listens there already" in second.log
        assert server.text()
        # One that is killed leaves its socket, which the next takes over.
        server.kill()
        assert path.is_socket()
        third = start_server("--uds", str(path))
        assert third.text()
        assert third.end() == 0
        assert not path.exists()

    def test_a_file_that_is_no_socket_stays(
        self, tmp_path: Path, start_server: Callable[..., ServerProcess]
    ) -> None:
        path = tmp_path / "precious"
        path.write_text("data")
        server = start_server("--uds", str(path), waits=False)
        assert server.process.wait(60) == EXIT_BAD_INPUT
        assert str(path) in server.log
        assert path.read_text() == "data"


class TestHealth:
    def test_it_tells_of_a_loop_that_is_stuck(self) -> None:
        with AppThread(make_state(health_timeout_s=0.2)) as server:
            go_on = threading.Event()
            loop = server._server.servers[0].get_loop()
            loop.call_soon_threadsafe(
                lambda: loop.create_task(server.state.engine.call(lambda engine: go_on.wait(60)))
            )
            wait_until(lambda: server.http.get("/health").status_code == 503, "it is stuck")
            health = server.http.get("/health").json()
            assert health["status"] == "stuck"
            assert health["loop_age_s"] > 0.2
            assert_error_is_none = server.http.get("/ready")
            assert assert_error_is_none.status_code == 503
            go_on.set()
            wait_until(lambda: server.http.get("/health").status_code == 200, "it goes on")

    def test_it_tells_of_an_engine_that_died(self) -> None:
        class DeadEngine(LLMEngine):
            def step(self) -> Any:
                raise SystemExit("the device is gone")

        def load(phases: StartupPhases) -> LLMEngine:
            engine = load_engine("demo", phases=phases)
            engine.__class__ = DeadEngine
            return engine

        with AppThread(make_state(load)) as server:
            body = {"prompt": "x", "max_tokens": 3}
            for is_streamed in (False, True):
                response = server.http.post("/v1/completions", json={**body, "stream": is_streamed})
                error = assert_error(response, 503)
                assert "the device is gone" in error["message"]
                assert response.headers["x-should-retry"] == "false"
            health = server.http.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "dead")
            assert health.json()["failure"] == "SystemExit: the device is gone"
            assert server.http.get("/metrics").status_code == 200

    def test_its_process_goes_on_answering_and_exits_with_an_error(
        self, start_server: Callable[..., ServerProcess]
    ) -> None:
        server = start_server(prepare=fail_every_step)
        server.may_complain = True
        for _ in range(6):
            response = server.post("/v1/completions", prompt="x")
            assert_error(response, 503)
        wait_until(lambda: server.http.get("/health").json()["status"] == "dead", "it is dead")
        assert server.end() == 1


class TestSleep:
    def test_requests_are_refused_until_it_wakes(self, shared_server: ServerProcess) -> None:
        admin = {"authorization": "Bearer admin-key"}
        response = shared_server.http.post("/admin/sleep", headers=admin)
        assert response.json() == {"is_asleep": True}
        assert shared_server.metric("vmalloc_kv_created_pages") == 0
        assert shared_server.http.get("/health").json()["status"] == "sleeping"
        assert shared_server.http.get("/ready").status_code == 503
        refused = shared_server.post("/v1/completions", prompt="x")
        assert_error(refused, 503, "engine_sleeping")
        flush = shared_server.http.post("/admin/prefix-cache/flush", headers=admin)
        assert_error(flush, 409, "engine_sleeping")
        for _ in range(2):
            response = shared_server.http.post("/admin/wake", headers=admin)
            assert response.json() == {"is_asleep": False}
        assert shared_server.text()

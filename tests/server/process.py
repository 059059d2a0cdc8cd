"""``vmalloc serve`` as its users run it: a process of its own, on a free port."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

DEADLINE_SECONDS = 120.0
"""Only bounds a hang: two cores may be busy with something else."""

REPOSITORY = Path(__file__).parents[2]
_LISTENING = re.compile(r"listening on (?:http://127\.0\.0\.1:(\d+)|unix:(\S+))")
_SAMPLE = re.compile(r"([a-z][\w:]*)(?:\{(.*)\})? (\S+)")


def wait_until(is_reached: Callable[[], bool], what: str) -> None:
    """Ask again and again."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_reached():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)


class ForkedProcess:
    """A child of a process that has imported everything already, which takes seconds.

    It has what the tests use of ``subprocess.Popen``.
    """

    def __init__(
        self, arguments: list[str], log_path: Path, prepare: Callable[[], None] | None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.server.preload"])
        self._process = context.Process(
            target=_run_forked, args=(arguments, str(log_path), prepare)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the server never ends"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self._process.kill()


def _run_forked(arguments: list[str], log_path: str, prepare: Callable[[], None] | None) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    sys.argv = ["vmalloc", *arguments]
    from vmalloc.cli import main

    main()


class ServerProcess:
    """A server and what it wrote.

    Args:
        flags: of ``vmalloc serve``; the port is a free one.
        log_path: where its output goes.
        waits: for ``/ready``; else for nothing.
        is_forked: save the time of the imports; else ``python -m vmalloc.cli`` is started.
        prepare: a function of a module that the forked process runs first.

    Attributes:
        process: it.
        http: a client of it.
        may_complain: set where a traceback in its log is expected.
    """

    def __init__(
        self,
        *flags: str,
        log_path: Path,
        waits: bool = True,
        is_forked: bool = True,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.log_path = log_path
        self.may_complain = False
        arguments = ["serve", "--port", "0", *flags]
        self.process: ForkedProcess | subprocess.Popen[bytes]
        log_path.touch()
        if is_forked:
            self.process = ForkedProcess(arguments, log_path, prepare)
        else:
            with log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "vmalloc.cli", *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=REPOSITORY,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
                )
        self._http: httpx.Client | None = None
        self._address: tuple[int, str | None] | None = None
        if waits:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise

    @property
    def log(self) -> str:
        """All it wrote so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def address(self) -> tuple[int, str | None]:
        """Its port, and its socket if it listens at one."""
        if self._address is None:

            def listens() -> bool:
                found = _LISTENING.search(self.log)
                if found is not None:
                    self._address = (int(found[1] or 0), found[2])
                assert found is not None or self.process.poll() is None, self.log
                return found is not None

            wait_until(listens, "the server listens")
        assert self._address is not None
        return self._address

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return self.address[0]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        """A client without a key."""
        if self._http is None:
            uds = self.address[1]
            transport = None if uds is None else httpx.HTTPTransport(uds=uds)
            limits = httpx.Limits(max_connections=None)
            self._http = httpx.Client(
                base_url=self.url, timeout=DEADLINE_SECONDS, transport=transport, limits=limits
            )
        return self._http

    def connect(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_SECONDS)

    def wait_ready(self) -> None:
        """Wait until it takes requests."""
        self._wait_until(lambda: self.http.get("/ready").status_code == 200, "it is ready")

    def _wait_until(self, is_reached: Callable[[], bool], what: str) -> None:
        def check() -> bool:
            assert self.process.poll() is None, self.log
            return is_reached()

        wait_until(check, what)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST JSON."""
        return self.http.post(path, json=body)

    def complete(self, prompt: Any = "def ", **body: Any) -> dict[str, Any]:
        """A good answer of ``/v1/completions``."""
        body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, **body}
        response = self.post("/v1/completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, prompt: Any = "def ", **body: Any) -> str:
        """What it writes after one prompt."""
        written: str = self.complete(prompt, **body)["choices"][0]["text"]
        return written

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        values = []
        for line in self.http.get("/metrics").text.splitlines():
            found = _SAMPLE.fullmatch(line)
            if found is None or found[1] != name:
                continue
            if all(f'{label}="{value}"' in (found[2] or "") for label, value in labels.items()):
                values.append(float(found[3]))
        assert values, f"there is no metric {name} {labels}"
        return sum(values)

    def wait_idle(self) -> None:
        """Wait until it knows of no request, and all pages are free, parked or cached."""

        def is_idle() -> bool:
            return (
                self.metric("vmalloc_live_requests") == 0
                and self.metric("vmalloc_queue_length") == 0
                and self.metric("vmalloc_kv_live_sequences") == 0
                and self.metric("vmalloc_kv_live_bytes") == 0
                and self.metric("vmalloc_kv_committed_bytes") == 0
                and self.metric("vmalloc_kv_swapped_bytes") == 0
            )

        self._wait_until(is_idle, "it is idle")

    def end(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and wait; its exit code, negative for a signal."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(DEADLINE_SECONDS)
        if self._http is not None:
            self._http.close()
            self._http = None
        if not self.may_complain:
            assert "Traceback" not in self.log, self.log
        return code

    def kill(self) -> None:
        """Whatever happens, it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._http is not None:
            self._http.close()


@contextmanager
def running_server(*flags: str) -> Iterator[ServerProcess]:
    """A server that ends well, for fixtures of any scope."""
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(*flags, log_path=Path(folder) / "server.log")
        try:
            yield server
            assert server.end() == 0, server.log
        finally:
            server.kill()


class Stream:
    """A streamed completion, read by a thread of its own.

    Attributes:
        text: what came so far.
        error: the error event, or None.
        is_done: whether the end marker came.
        status: of the response.
    """

    def __init__(self, server: ServerProcess, prompt: Any = "def ", **body: Any) -> None:
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.is_done = False
        self.failure: Exception | None = None
        self.status = 0
        self.finish_reason: str | None = None
        self._server = server
        body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, **body}
        self._body = {"prompt": prompt, "stream": True, **body}
        self._has_text = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._server.http.stream("POST", "/v1/completions", json=self._body) as response:
                self.status = response.status_code
                if response.status_code != 200:
                    self.error = json.loads(response.read())["error"]
                    return
                for data in events(response.iter_lines()):
                    self._take(data)
        except Exception as error:
            self.failure = error
        finally:
            self._has_text.set()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self._has_text.set()

    def wait_text(self) -> None:
        """Wait for its first text."""
        assert self._has_text.wait(DEADLINE_SECONDS)
        assert self.text, (self.status, self.error, self.failure)

    def join(self) -> Stream:
        """Wait for its end."""
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "a stream never ends"
        return self


def events(lines: Iterator[str]) -> Iterator[str]:
    """The data of server-sent events; comments left out."""
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
        else:
            assert not line or line.startswith(":"), line


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The ``error`` of a response in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert all(isinstance(error[key], str | None) for key in ("param", "code"))
    if code is not None:
        assert error["code"] == code, error
    return error

"""A real server on a free port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from vmalloc.engine import AsyncLLMEngine, EngineConfig, LLMEngine, load_engine
from vmalloc.server.config import ServerConfig
from vmalloc.server.run import DrainingServer, listen
from vmalloc.server.state import ServerState

T = TypeVar("T")

DEADLINE_SECONDS = 120.0
SETTINGS: dict[str, Any] = {
    # A lone sequence and one in a batch get the same logits, so texts can be compared.
    "batch_invariant": True,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
}


class _Server(DrainingServer):
    """The product's own server, which tells when it is ready."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self.has_started = threading.Event()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

    def _engine_started(self, error: BaseException | None) -> None:
        super()._engine_started(error)
        self.has_started.set()


class RunningServer:
    """The demo model behind a socket.

    Attributes:
        url: where it listens.
        http: a client of it.
        state: what its handlers share; touch it on its loop only.
    """

    def __init__(self, config: ServerConfig | None = None, **engine_settings: Any) -> None:
        config = config or ServerConfig(port=0)
        engine_config = EngineConfig(**{**SETTINGS, **engine_settings})
        engine = AsyncLLMEngine(
            lambda phases: load_engine("demo", None, engine_config, phases=phases),
            max_queued_requests=config.max_queued_requests,
        )
        self.state = ServerState(engine, config, model="demo", created=int(time.time()))
        self._listener = listen(config)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_SECONDS)
        self._uvicorn = _Server(self.state)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([self._listener],), daemon=True
        )
        self._thread.start()
        assert self._uvicorn.has_started.wait(DEADLINE_SECONDS)
        assert self._uvicorn.start_error is None, self._uvicorn.start_error

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST JSON, in ASCII: half a surrogate pair is sent as it is."""
        headers = {"content-type": "application/json"}
        return self.http.post(path, content=json.dumps(body), headers=headers)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of ``/v1/completions``, which must be a good one."""
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, without the end marker, which must be there."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1] if not event.startswith(":")]

    def on_engine(self, function: Callable[[LLMEngine], T]) -> T:
        """What a function of the engine returns, between two of its steps."""
        loop = self._uvicorn.loop
        call = asyncio.run_coroutine_threadsafe(self.state.engine.call(function), loop)
        return call.result(DEADLINE_SECONDS)

    def connections(self) -> list[Any]:
        """The server's ends of the connections that are open."""
        protocols = list(self._uvicorn.server_state.connections)
        return [protocol.transport.get_extra_info("socket") for protocol in protocols]

    def wait_idle(self) -> None:
        """Wait until no request is live."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.on_engine(lambda engine: engine.has_unfinished_requests()):
            assert time.monotonic() < deadline, "a request runs on"
            time.sleep(0.01)

    def close(self) -> None:
        """End it; nothing of it is left."""
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()
        self._listener.close()

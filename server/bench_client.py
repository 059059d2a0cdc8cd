"""``vmalloc bench URL``: sends a load to a server and measures what its clients see.

Owns: one HTTP client and the requests under way.  Thread-safety: none; one event loop.

Knows the OpenAI API alone, so any server that has it will do; where the server also answers vLLM's
``/tokenize``, prompts are token ids and have exactly the lengths that were drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from ..errors import ConfigError
from .bench_load import WORDS, BenchSettings, PlannedRequest, plan_load
from .bench_result import BenchResult, RequestResult

CONNECT_SECONDS = 10.0
PROBE_LENGTH = 8
"""Tokens, or characters, of the request ahead of the load."""

EXACT_PROMPTS = "token ids from /tokenize, of exactly the drawn lengths"
TEXT_PROMPTS = "text of about the drawn lengths, one word a token"
MAX_REASON_CHARS = 60

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

OnProgress = Callable[[RequestResult], None]


def run_bench(
    settings: BenchSettings, on_progress: OnProgress = lambda result: None
) -> BenchResult:
    """Send the load and wait for the answers; ``on_progress`` hears of each that ended.

    Ctrl-C, and the time limit, end it early with what there is. Raises ``ConfigError`` if the
    server cannot be reached or refuses the first request.
    """
    return asyncio.run(_Bench(settings, on_progress).run())


class _Bench:
    def __init__(self, settings: BenchSettings, on_progress: OnProgress) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._stop = asyncio.Event()

    async def run(self) -> BenchResult:
        settings = self._settings
        headers = {}
        if settings.api_key is not None:
            headers["authorization"] = f"Bearer {settings.api_key}"
        async with httpx.AsyncClient(
            base_url=settings.url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(settings.request_timeout_s, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        ) as client:
            model, max_model_len = await self._find_model(client)
            token_ids = None
            if settings.endpoint == "completions":
                token_ids = await self._find_tokens(client, model)
            planned = plan_load(settings, token_ids, max_model_len)
            prompts = TEXT_PROMPTS if token_ids is None else EXACT_PROMPTS
            result = BenchResult(settings, model, prompts)
            await self._try_one(client, model, planned[0])
            with self._stopping_on_interrupt():
                await self._send_all(client, model, planned, result)
        return result

    async def _find_model(self, client: httpx.AsyncClient) -> tuple[str, int | None]:
        """Whom to ask for, and its context if the server says."""
        wanted = self._settings.model
        document = await self._get_json(client, "/v1/models")
        cards = document.get("data", []) if isinstance(document, dict) else []
        names = [card.get("id") for card in cards]
        if wanted == "auto" and not names:
            raise ConfigError(f"{self._settings.url} lists no model; name one with --model")
        name = names[0] if wanted == "auto" else wanted
        lengths = [card.get("max_model_len") for card in cards if card.get("id") == name]
        return str(name), lengths[0] if lengths else None

    async def _get_json(self, client: httpx.AsyncClient, path: str) -> Any:
        url = self._settings.url
        try:
            response = await client.get(path)
        except httpx.HTTPError as error:
            raise ConfigError(f"url is {url!r}; it cannot be reached: {_words(error)}") from error
        if response.status_code != 200:
            raise ConfigError(
                f"url is {url!r}; GET {path} answers {response.status_code}: {_message(response)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise ConfigError(f"url is {url!r}; GET {path} answers no JSON: {error}") from error

    async def _find_tokens(self, client: httpx.AsyncClient, model: str) -> list[int] | None:
        """Tokens of plain words; None if the server does not tell."""
        body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        try:
            response = await client.post("/tokenize", json=body)
            tokens = response.json()["tokens"] if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return sorted(set(tokens)) if tokens else None

    async def _try_one(
        self, client: httpx.AsyncClient, model: str, planned: PlannedRequest
    ) -> None:
        """One request ahead of the load, so that a wrong setting shows at once."""
        prompt = planned.prompt[-PROBE_LENGTH:]  # no beginning of it, which would be cached then
        one = await self._request(client, model, PlannedRequest(0.0, prompt, 1))
        if one.failure is not None:
            raise ConfigError(
                f"url is {self._settings.url!r}; a first request failed: {one.failure}"
            )

    async def _send_all(
        self,
        client: httpx.AsyncClient,
        model: str,
        planned: list[PlannedRequest],
        result: BenchResult,
    ) -> None:
        limit = self._settings.max_concurrency
        room = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
        started = time.perf_counter()

        async def send(one: PlannedRequest) -> None:
            await asyncio.sleep(max(0.0, started + one.arrival_s - time.perf_counter()))
            async with room:
                measured = await self._request(client, model, one)
            result.requests.append(measured)
            result.duration_s = time.perf_counter() - started
            self._on_progress(measured)

        tasks = [asyncio.create_task(send(one)) for one in planned]
        stop = asyncio.create_task(self._stop.wait())
        everything = asyncio.gather(*tasks)
        await asyncio.wait(
            (everything, stop),
            timeout=self._settings.time_limit_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.gather(everything, stop, *tasks, return_exceptions=True)
        result.num_unfinished = len(planned) - len(result.requests)
        if result.num_unfinished:
            result.duration_s = time.perf_counter() - started

    async def _request(
        self, client: httpx.AsyncClient, model: str, planned: PlannedRequest
    ) -> RequestResult:
        """Send one and measure it; a failure is a class, never an exception."""
        result = RequestResult()
        started = last = time.perf_counter()
        is_done = False
        try:
            async with client.stream(
                "POST", _PATHS[self._settings.endpoint], json=self._body(model, planned)
            ) as response:
                if response.status_code != 200:
                    await response.aread()
                    result.failure = f"{response.status_code} {_message(response)}"
                    return result
                async for data in _events(response):
                    if data == "[DONE]":
                        is_done = True
                        break
                    event = json.loads(data)
                    if "error" in event:
                        result.failure = f"event {_error_code(event)}"
                        return result
                    _read_usage(event, result)
                    if _has_token(event):
                        now = time.perf_counter()
                        if result.ttft_s is None:
                            result.ttft_s = now - started
                        else:
                            result.gaps_s.append(now - last)
                        last = now
        except httpx.TimeoutException:
            result.failure = "timeout"
        except httpx.ConnectError:
            result.failure = "connect"
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            result.failure = f"cut short: {type(error).__name__}"
        if result.failure is None and not is_done:
            result.failure = "cut short: no [DONE]"
        if result.ttft_s is None and result.failure is None:
            result.failure = "no token came"
        if result.ttft_s is not None:
            result.e2el_s = last - started
        return result

    def _body(self, model: str, planned: PlannedRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": planned.num_output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.ignore_eos:
            body["ignore_eos"] = True
        if self._settings.endpoint == "completions":
            body["prompt"] = planned.prompt
        else:
            body["messages"] = [{"role": "user", "content": planned.prompt}]
        return body

    @contextlib.contextmanager
    def _stopping_on_interrupt(self) -> Any:
        """Ctrl-C ends the load; a second one ends the process."""
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._stop.set()

        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        except (RuntimeError, ValueError):  # not the main thread
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event; comments are skipped."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()


def _has_token(event: dict[str, Any]) -> bool:
    """Whether an event brings a token: any choice of a completion, text of a chat.

    A chat begins with a chunk that only names the role, and that is no token.
    """
    choices = event.get("choices") or []
    if not choices:
        return False
    if "delta" not in choices[0]:
        return True
    return bool(choices[0]["delta"].get("content"))


def _read_usage(event: dict[str, Any], result: RequestResult) -> None:
    usage = event.get("usage")
    if usage:
        result.num_input_tokens = usage["prompt_tokens"]
        result.num_output_tokens = usage["completion_tokens"]


def _message(response: httpx.Response) -> str:
    """The server's short reason."""
    try:
        return _error_code(response.json())
    except (ValueError, AttributeError):
        return response.reason_phrase


def _error_code(document: dict[str, Any]) -> str:
    error = document.get("error")
    if not isinstance(error, dict):
        return str(error or document.get("detail", ""))[:MAX_REASON_CHARS]
    return str(error.get("code") or error.get("message"))[:MAX_REASON_CHARS]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__

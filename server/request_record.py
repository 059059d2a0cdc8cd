"""What is known of one HTTP request: for its log line, its span and the metrics.

Owns: the notes of one request.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..engine import (
    ConfigError,
    EngineRequest,
    EngineUnavailableError,
    QueueFullError,
    RequestAbortedError,
    RequestOutput,
    RequestTimeoutError,
    SamplingParams,
)
from .disconnect import ClientDisconnectedError
from .metrics import ServerMetrics

_SCOPE_KEY = "vmalloc.record"


@dataclass(slots=True)
class _Prompt:
    params: SamplingParams
    last_token_time: float | None = None
    num_tokens: dict[int, int] = field(default_factory=dict)
    is_known: bool = False
    is_finished: bool = False


class RequestRecord:
    """One request, from its head to the end of its response.

    Args:
        metrics: hears of what happens.
        method, path: what was asked for.

    Attributes:
        started: when its head was read, in seconds of ``time.monotonic()``.
        request_id: the engine's name of it; None if it generates nothing.
        params: of its first prompt, or None.
        num_prompt_tokens, num_cached_tokens, num_generated_tokens: over all its prompts.
        time_to_first_token_s: since ``started``; None before.
        queue_time_s: until the first step took it up; None before.
        num_preemptions: of all its prompts.
        finish_reasons: of its completions, as they ended.
        abort_reason: why it was given up, or None.
    """

    def __init__(self, metrics: ServerMetrics, method: str, path: str) -> None:
        self.method = method
        self.path = path
        self.started = time.monotonic()
        self.request_id: str | None = None
        self.params: SamplingParams | None = None
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.time_to_first_token_s: float | None = None
        self.queue_time_s: float | None = None
        self.num_preemptions = 0
        self.finish_reasons: list[str] = []
        self.abort_reason: str | None = None
        self._metrics = metrics
        self._prompts: list[_Prompt] = []

    @classmethod
    def of(cls, connection: HTTPConnection) -> RequestRecord:
        """The record that ``attach`` put there."""
        record: RequestRecord = connection.scope[_SCOPE_KEY]
        return record

    def attach(self, scope: Scope) -> None:
        """Let handlers find it."""
        scope[_SCOPE_KEY] = self

    def reject(self, error: BaseException) -> None:
        """The engine did not take it."""
        if isinstance(error, QueueFullError):
            self._metrics.observe_rejection("queue_full")
        elif isinstance(error, EngineUnavailableError):
            self._metrics.observe_rejection(error.state)
        elif isinstance(error, ConfigError):
            self._metrics.observe_rejection("invalid")

    def accept(self, request_id: str, requests: Sequence[EngineRequest]) -> None:
        """The engine took it."""
        self.request_id = request_id
        self._prompts = [_Prompt(request.params) for request in requests]
        self.params = requests[0].params if requests else None

    def add(self, prompt_idx: int, output: RequestOutput) -> None:
        """One of its prompts has something new, or, where it is not streamed, everything."""
        prompt, times = self._prompts[prompt_idx], output.metrics
        if not prompt.is_known:
            prompt.is_known = True
            self.num_prompt_tokens += len(output.prompt_token_ids)
            self.num_cached_tokens += output.num_cached_tokens or 0
        num_new = 0
        for completion in output.outputs:
            num_before = prompt.num_tokens.get(completion.index, 0)
            prompt.num_tokens[completion.index] = num_before + len(completion.token_ids)
            num_new += len(completion.token_ids)
            if completion.finish_reason is not None:
                self.finish_reasons.append(completion.finish_reason)
        self.num_generated_tokens += num_new
        if num_new or output.is_finished:
            self._metrics.observe_output(times, prompt.last_token_time)
            prompt.last_token_time = times.last_token_time
        if self.time_to_first_token_s is None and times.first_token_time is not None:
            self.time_to_first_token_s = times.first_token_time - self.started
        if self.queue_time_s is None and times.first_scheduled_time is not None:
            self.queue_time_s = times.first_scheduled_time - times.arrival_time
        if output.is_finished:
            prompt.is_finished = True
            self.num_preemptions += times.num_preemptions
            self._metrics.observe_finished(output, prompt.params, prompt.num_tokens)

    def add_all(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        """``add`` each of them."""
        for prompt_idx, output in outputs:
            self.add(prompt_idx, output)

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes of it. ``error``: what ended it early, or None."""
        num_left = sum(not prompt.is_finished for prompt in self._prompts)
        if num_left and self.abort_reason is None:
            self.abort_reason = _abort_reason(error)
            self._metrics.observe_abort(self.abort_reason, num_left)


def _abort_reason(error: BaseException | None) -> str:
    if isinstance(error, asyncio.CancelledError | ClientDisconnectedError):
        return "disconnect"
    if isinstance(error, RequestTimeoutError):
        return f"{error.kind}_timeout"
    if isinstance(error, RequestAbortedError):
        return "aborted"
    return "engine" if isinstance(error, EngineUnavailableError) else "error"

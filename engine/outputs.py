"""What a request returns; shapes and names follow vLLM's offline API.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ErrorKind = Literal["memory", "request"]


@dataclass(slots=True)
class Logprob:
    """One candidate token at one position.

    Attributes:
        logprob: natural log-probability before temperature and filters.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: its text, or None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: number of the completion, from 0.
        text: generated text, stop strings and skipped special tokens left out.
        token_ids: generated tokens, the one that ended the request included.
        cumulative_logprob: sum over ``logprobs`` of the chosen tokens; None if not asked for.
        logprobs: per token, candidates by token id; None if not asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``; None while running.
        stop_reason: the stop string or stop token that ended it; None for the end token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.monotonic()``.

    Attributes:
        arrival_time: ``add_request`` accepted it.
        first_scheduled_time: its first step began.
        first_token_time: its first token was sampled.
        finished_time: it ended.
        num_preemptions: times it gave up its memory, to swap space or to be computed again.
        last_token_time: its latest token was sampled.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    last_token_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """State of one request after a step.

    Attributes:
        request_id: the caller's name for it.
        prompt: its text; None if it came as token ids.
        prompt_token_ids: its tokens.
        outputs: one completion per choice; with ``best_of`` and beam search the best come first.
            Under ``RequestOutputKind.DELTA`` only those that have something new.
        is_finished: whether nothing more will come.
        error: what went wrong, when ``finish_reason`` is ``"error"``.
        error_kind: ``"memory"`` if the KV cache cannot hold it, ``"request"`` if what it asks for
            leaves no token to choose.
        metrics: its timestamps.
        num_cached_tokens: prompt tokens that were not computed, as their KV was cached; None
            before it started.
        prompt_logprobs: per prompt token, candidates by token id, None for the first token; None
            if not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    is_finished: bool
    error: str | None = None
    error_kind: ErrorKind | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """vLLM's name for ``is_finished``."""
        return self.is_finished

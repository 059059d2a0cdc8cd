"""Seeded workloads: who asks when, with what prompt, for how many tokens, chosen how.

Prompts are random token ids, so no tokenizer is needed. Every completion has exactly the length
that is asked for (end tokens are ignored), so whoever serves a workload does the same work.

Lengths are those of a context of 1,024 tokens, less in proportion where a model has a shorter one;
``long`` alone grows with the context.

Owns: nothing.  Thread-safety: pure functions; the same arguments make the same workload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import ConfigError
from ...measuring.lengths import draw_lengths

Method = Literal["greedy", "sample", "beam"]

NUM_CHOICES = 4
"""Completions of a request with parallel samples; width of a beam search."""

MIN_CONTEXT = 16
REFERENCE_CONTEXT = 1024
LONGEST_CONTEXT = 8192
"""``long`` goes no further, so that a run ends in a time that one can wait for."""

MIN_TOKENS = 4
PROMPT_MEAN, MAX_PROMPT = 160, 768
OUTPUT_MEAN, MAX_OUTPUT = 120, 512
SHARED_PROMPT, OWN_PROMPT, SHORT_OUTPUT = 512, 32, 64

BURST_REQUESTS, BURST_PERIOD_S, BURST_GAP_S = 8, 1.0, 0.01
MIXED_GAP_S = 0.06


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request.

    Attributes:
        arrival_s: when it is made, in seconds after the start.
        prompt_token_ids: its prompt.
        num_output_tokens: tokens of each completion.
        method: greedy, sampled at temperature 1 with ``seed``, or found by beam search.
        num_completions: completions wanted; the width of a beam search.
        seed: of its random numbers, for ``"sample"``.
    """

    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    method: Method = "greedy"
    num_completions: int = 1
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output of one completion."""
        return len(self.prompt_token_ids) + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival.

    Attributes:
        name: its kind, or a trace file's name.
        summary: what it is, in words.
        is_realtime: whether requests arrive as time goes by; else all are there at the start.
    """

    name: str
    summary: str
    requests: tuple[WorkloadRequest, ...]
    is_realtime: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all completions together."""
        return sum(one.num_output_tokens * one.num_completions for one in self.requests)

    def describe(self) -> dict[str, Any]:
        """What it holds, as plain values."""
        prompts = [len(one.prompt_token_ids) for one in self.requests]
        outputs = [one.num_output_tokens for one in self.requests]
        return {
            "name": self.name,
            "summary": self.summary,
            "is_realtime": self.is_realtime,
            "num_requests": len(self.requests),
            "num_completions": sum(one.num_completions for one in self.requests),
            "prompt_tokens": _range_of(prompts),
            "output_tokens": _range_of(outputs),
            "last_arrival_s": max((one.arrival_s for one in self.requests), default=0.0),
        }


@dataclass(frozen=True, slots=True)
class WorkloadKind:
    """A kind of workload.

    Attributes:
        summary: what it is, in words.
        num_requests, num_quick_requests: how many it has by default, and in a quick run.
        make: draws so many requests.
        is_realtime: see ``Workload``.
    """

    summary: str
    num_requests: int
    num_quick_requests: int
    make: Callable[[_Source, int], list[WorkloadRequest]]
    is_realtime: bool = False


def make_workload(
    kind: str,
    *,
    vocab_size: int,
    context_tokens: int,
    num_requests: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> Workload:
    """The requests of a kind of ``KINDS``, for a model of that vocabulary and context.

    Args:
        num_requests: how many; None: as many as the kind has by default.
        scale: shortens all lengths, and the time between arrivals; at most 1.

    Raises ``ConfigError`` naming a value that cannot work.
    """
    if kind not in KINDS:
        raise ConfigError(f"workload is {kind!r}; supported: {', '.join(KINDS)}")
    made = KINDS[kind]
    if num_requests is None:
        num_requests = made.num_requests
    if num_requests < 1:
        raise ConfigError(f"num_requests is {num_requests}; it must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more")
    source = _Source([seed, *kind.encode()], vocab_size, context_tokens, scale)
    requests = made.make(source, num_requests)
    return Workload(kind, made.summary, tuple(requests), made.is_realtime)


class _Source:
    """Draws lengths, tokens and times.

    Attributes:
        rng: the generator, in case more is to be drawn.
        scale: see ``make_workload``.
    """

    def __init__(
        self, seeds: list[int], vocab_size: int, context_tokens: int, scale: float
    ) -> None:
        if context_tokens < MIN_CONTEXT:
            raise ConfigError(
                f"the context is {context_tokens} tokens; a workload needs at least {MIN_CONTEXT}"
            )
        if vocab_size < 2:
            raise ConfigError(f"the vocabulary is {vocab_size}; it must be at least 2")
        if not 0 < scale <= 1:
            raise ConfigError(f"scale is {scale}; it must be above 0 and at most 1")
        self.rng = np.random.default_rng(seeds)
        self.scale = scale
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens

    def scaled(self, num_tokens: int) -> int:
        """So many tokens of a context of ``REFERENCE_CONTEXT``, in this one."""
        share = min(self._context_tokens, REFERENCE_CONTEXT) / REFERENCE_CONTEXT
        return max(1, round(num_tokens * share * self.scale))

    def tokens(self, count: int) -> tuple[int, ...]:
        """Random token ids; 0 is left out, where texts often begin or end."""
        return tuple(self.rng.integers(1, self._vocab_size, count).tolist())

    def chat(self, count: int) -> list[tuple[int, int]]:
        """Prompt and output lengths as people have them: most short, some long."""
        prompts = self._lognormal(PROMPT_MEAN, MAX_PROMPT, count)
        outputs = self._lognormal(OUTPUT_MEAN, MAX_OUTPUT, count)
        limit = self.scaled(REFERENCE_CONTEXT)
        pairs = zip(prompts, outputs, strict=True)
        return [(prompt, max(1, min(output, limit - prompt))) for prompt, output in pairs]

    def prompts(self, count: int) -> list[tuple[int, ...]]:
        """Prompts of such lengths."""
        return [self.tokens(num) for num in self._lognormal(PROMPT_MEAN, MAX_PROMPT, count)]

    def long(self) -> tuple[int, int]:
        """Prompt and output length of a request that takes most of the context."""
        limit = min(self._context_tokens, LONGEST_CONTEXT) * self.scale
        prompt = max(1, int(self.rng.uniform(limit / 2, 3 * limit / 4)))
        return prompt, max(1, int(limit / 32))

    def seed(self) -> int:
        """Of one request's random numbers."""
        return int(self.rng.integers(1 << 31))

    def _lognormal(self, mean: int, maximum: int, count: int) -> list[int]:
        low, high = self.scaled(MIN_TOKENS), self.scaled(maximum)
        return draw_lengths(self.rng, self.scaled(mean), count, minimum=low, maximum=high)


def _make_offline(source: _Source, count: int) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(0.0, source.tokens(prompt), output) for prompt, output in source.chat(count)
    ]


def _make_long(source: _Source, count: int) -> list[WorkloadRequest]:
    lengths = [source.long() for _ in range(count)]
    return [WorkloadRequest(0.0, source.tokens(prompt), output) for prompt, output in lengths]


def _make_prefix(source: _Source, count: int) -> list[WorkloadRequest]:
    shared = source.tokens(source.scaled(SHARED_PROMPT))
    own, output = source.scaled(OWN_PROMPT), source.scaled(SHORT_OUTPUT)
    return [WorkloadRequest(0.0, shared + source.tokens(own), output) for _ in range(count)]


def _make_parallel(source: _Source, count: int) -> list[WorkloadRequest]:
    output = source.scaled(SHORT_OUTPUT)
    return [
        WorkloadRequest(0.0, prompt, output, "sample", NUM_CHOICES, source.seed())
        for prompt in source.prompts(count)
    ]


def _make_beam(source: _Source, count: int) -> list[WorkloadRequest]:
    output = source.scaled(SHORT_OUTPUT)
    return [
        WorkloadRequest(0.0, prompt, output, "beam", NUM_CHOICES)
        for prompt in source.prompts(count)
    ]


def _make_bursty(source: _Source, count: int) -> list[WorkloadRequest]:
    requests = []
    after_s = 0.0  # since its burst began
    for idx, (prompt, output) in enumerate(source.chat(count)):
        burst_idx, place = divmod(idx, BURST_REQUESTS)
        if place == 0:
            after_s = 0.0
        arrival_s = (burst_idx * BURST_PERIOD_S + after_s) * source.scale
        after_s += float(source.rng.exponential(BURST_GAP_S))
        requests.append(WorkloadRequest(arrival_s, source.tokens(prompt), output))
    return sorted(requests, key=lambda one: one.arrival_s)


def _make_mixed(source: _Source, count: int) -> list[WorkloadRequest]:
    """Every kind of request in turn, so that even a small run has all of them."""
    shared = source.tokens(source.scaled(SHARED_PROMPT))
    output = source.scaled(SHORT_OUTPUT)
    requests: list[WorkloadRequest] = []
    arrival_s = 0.0
    for idx, (num_prompt, num_output) in enumerate(source.chat(count)):
        prompt = source.tokens(num_prompt)
        match idx % 8:
            case 1 | 5:
                own = source.tokens(source.scaled(OWN_PROMPT))
                one = WorkloadRequest(arrival_s, shared + own, output)
            case 2:
                one = WorkloadRequest(arrival_s, prompt, output, "beam", NUM_CHOICES)
            case 3:
                one = WorkloadRequest(arrival_s, prompt, num_output, "sample", 1, source.seed())
            case 4:
                num_prompt, num_output = source.long()
                one = WorkloadRequest(arrival_s, source.tokens(num_prompt), num_output)
            case 6:
                one = WorkloadRequest(
                    arrival_s, prompt, output, "sample", NUM_CHOICES, source.seed()
                )
            case _:
                one = WorkloadRequest(arrival_s, prompt, num_output)
        requests.append(one)
        arrival_s += float(source.rng.exponential(MIXED_GAP_S)) * source.scale
    return requests


def _range_of(values: list[int]) -> dict[str, float]:
    return {
        "mean": sum(values) / len(values) if values else 0.0,
        "min": min(values, default=0),
        "max": max(values, default=0),
    }


KINDS: dict[str, WorkloadKind] = {
    "offline": WorkloadKind("chat-like lognormal lengths, all at once", 64, 20, _make_offline),
    "long": WorkloadKind("prompts of half the context and more, all at once", 12, 6, _make_long),
    "prefix": WorkloadKind("one long shared prompt beginning, all at once", 32, 16, _make_prefix),
    "parallel": WorkloadKind("4 samples of each prompt, all at once", 16, 6, _make_parallel),
    "beam": WorkloadKind("beam search of width 4, all at once", 8, 4, _make_beam),
    "bursty": WorkloadKind(
        "chat-like lengths, arriving in bursts", 48, 16, _make_bursty, is_realtime=True
    ),
    "mixed": WorkloadKind(
        "all of these together, arriving at random", 48, 16, _make_mixed, is_realtime=True
    ),
}
"""What there is, by name."""

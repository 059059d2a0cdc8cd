"""The load of ``vmalloc bench``: who asks when, for how many tokens, after what prompt.

Owns: nothing.  Thread-safety: pure functions; the same seed makes the same load.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigError

Endpoint = Literal["completions", "chat"]

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
WORDS = (
    *("the", "a", "value", "list", "of", "and", "to", "in", "number", "for", "is", "with"),
    *("when", "this", "function", "returns", "each", "line", "name", "text", "all", "data"),
)
"""Prompts of a server that gives no token ids are made of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to send, and where.

    Attributes:
        url: base URL of the server.
        endpoint: ``"completions"`` or ``"chat"``.
        model: name to ask for; ``"auto"`` is the first that the server lists.
        api_key: sent as Bearer token.
        num_prompts: requests in all.
        request_rate: mean requests a second, as a Poisson process; infinity sends all at once.
        max_concurrency: most requests at a time; None: any number.
        seed: fixes arrivals, lengths and prompts.
        input_len, output_len: medians of the log-normal lengths, in tokens.
        length_spread: sigma of both; 0 makes all requests equal.
        goodput: milliseconds that a good request stays below, by metric: ``ttft``, ``tpot``,
            ``e2el``.
        time_limit_s: when to stop, whatever is left.
        request_timeout_s: seconds that one request waits for the next bytes.
        ignore_eos: have every answer go on to its full length.
    """

    url: str
    endpoint: Endpoint = "completions"
    model: str = "auto"
    api_key: str | None = None
    num_prompts: int = 100
    request_rate: float = math.inf
    max_concurrency: int | None = None
    seed: int = 0
    input_len: int = 128
    output_len: int = 64
    length_spread: float = 0.5
    goodput: tuple[tuple[str, float], ...] = ()
    time_limit_s: float = 600.0
    request_timeout_s: float = 120.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}; it must start with http:// or https://")
        if self.endpoint not in get_args(Endpoint):
            raise ConfigError(f"endpoint is {self.endpoint!r}; supported: completions, chat")
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency is {self.max_concurrency}; it must be at least 1")
        for name in ("request_rate", "time_limit_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.length_spread <= 3:
            raise ConfigError(f"length_spread is {self.length_spread}; it must be from 0 to 3")
        for metric, limit in self.goodput:
            if metric not in GOODPUT_METRICS or not limit > 0:
                raise ConfigError(
                    f"goodput has {metric}:{limit}; it takes {', '.join(GOODPUT_METRICS)} with "
                    "milliseconds above 0"
                )


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the load.

    Attributes:
        arrival_s: when it is sent, after the start.
        prompt: token ids, or text.
        num_output_tokens: length of its answer.
    """

    arrival_s: float
    prompt: list[int] | str
    num_output_tokens: int


def read_goodput(entries: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """``["ttft:500", "tpot:50"]`` in milliseconds, as vLLM's ``--goodput``. Raises
    ``ConfigError``."""
    result = []
    for entry in [part for text in entries for part in text.split()]:
        metric, _, limit = entry.partition(":")
        try:
            result.append((metric, float(limit)))
        except ValueError:
            raise ConfigError(
                f"goodput is {entry!r}; it must be METRIC:MILLISECONDS, e.g. ttft:500"
            ) from None
    return tuple(result)


def plan_load(
    settings: BenchSettings, token_ids: Sequence[int] | None, max_model_len: int | None
) -> list[PlannedRequest]:
    """The whole load.

    Args:
        token_ids: tokens that prompts are drawn from; None: prompts are text, about as many words
            as they should have tokens.
        max_model_len: most tokens of a prompt and its answer; longer ones are cut. None: unknown.
    """
    rng = random.Random(settings.seed)
    arrival_s = 0.0
    planned = []
    for _ in range(settings.num_prompts):
        num_input = _draw_length(rng, settings.input_len, settings.length_spread)
        num_output = _draw_length(rng, settings.output_len, settings.length_spread)
        if max_model_len is not None:
            num_input = max(1, min(num_input, max_model_len - 1))
            num_output = max(1, min(num_output, max_model_len - num_input))
        prompt: list[int] | str
        if token_ids is None:
            prompt = " ".join(rng.choices(WORDS, k=num_input))
        else:
            prompt = rng.choices(token_ids, k=num_input)
        planned.append(PlannedRequest(arrival_s, prompt, num_output))
        if math.isfinite(settings.request_rate):
            arrival_s += rng.expovariate(settings.request_rate)
    return planned


def _draw_length(rng: random.Random, median: int, spread: float) -> int:
    return max(1, round(median * math.exp(rng.gauss(0.0, spread))))

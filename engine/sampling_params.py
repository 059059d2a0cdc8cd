"""How tokens of one request are chosen and when it ends; names follow vLLM.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError

MAX_SEED = 2**64 - 1


class RequestOutputKind(Enum):
    """What ``LLMEngine.step`` reports for a request that is still running."""

    CUMULATIVE = "cumulative"
    """All text and tokens so far, after every step."""
    DELTA = "delta"
    """Only what is new, after every step that has something new."""
    FINAL_ONLY = "final_only"
    """Nothing until the request is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. A value that cannot be honoured raises ``ConfigError``.

    Attributes:
        n: completions per prompt. Only 1 for now.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens (ties with the k-th stay). 0 or -1: all.
        top_p: then among the fewest tokens whose probabilities reach this sum.
        seed: fixes the request's random numbers whatever runs beside it. None: drawn by the engine.
        max_tokens: most tokens to generate. None: as many as the context holds.
        min_tokens: no stop token or stop string ends the request before this many tokens.
        stop: strings that end the request; the text ends before them.
        stop_token_ids: tokens that end the request, in addition to the model's end token.
        ignore_eos: go on past the model's end token.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logprobs: report the log-probabilities of that many most likely tokens, and of the chosen
            one, before temperature and filters. 0: of the chosen one only.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text at all.
        output_kind: what is reported while the request runs.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            self._freeze(name)
        for name in (
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ConfigError(
                f"output_kind is {self.output_kind!r}; it must be a RequestOutputKind"
            )
        for name in ("n", "top_k", "min_tokens", "max_tokens", "logprobs", "seed"):
            _check_int(name, getattr(self, name), is_optional=name not in ("n", "top_k"))
        _check_choices(self.n)
        _check_max_tokens(self.max_tokens)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} is {value!r}; it must be a number")
        if not 0.0 <= self.temperature <= sys.float_info.max:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more, finite")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < -1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1, or 0 or -1 for all")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; it must be between 0 and {MAX_SEED}")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens is {self.min_tokens}; it must be 0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, {self.max_tokens}"
            )
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs is {self.logprobs}; it must be 0 or more")
        self._check_stops()

    def _freeze(self, name: str) -> None:
        """Make a list a tuple: a caller's later change must not reach a running request."""
        value = getattr(self, name)
        if value is None or isinstance(value, str):
            return
        if not isinstance(value, list | tuple | set | frozenset):
            raise ConfigError(f"{name} is a {type(value).__name__}; it must be a list")
        object.__setattr__(self, name, tuple(value))

    def _check_stops(self) -> None:
        if any(not isinstance(text, str) for text in self.stop_strings):
            raise ConfigError(f"stop is {self.stop!r}; it must be a string or strings")
        if "" in self.stop_strings:
            raise ConfigError("stop holds an empty string; every text would end before it")
        if self.stop_strings and not self.detokenize:
            raise ConfigError(f"stop is {self.stop!r}; stop strings need detokenize=True")
        if isinstance(self.stop_token_ids, str):
            raise ConfigError(f"stop_token_ids is {self.stop_token_ids!r}; it must be a list")
        for token_id in self.stop_token_ids or ():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ConfigError(f"stop_token_ids holds {token_id!r}; ids are integers from 0")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0


def _check_int(name: str, value: int | None, is_optional: bool) -> None:
    if value is None and is_optional and name != "min_tokens":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be an integer")


def _check_choices(n: int) -> None:
    if n < 1:
        raise ConfigError(f"n is {n}; it must be at least 1")
    if n > 1:
        raise ConfigError(f"n is {n}; more than 1 completion per prompt is not supported yet")


def _check_max_tokens(max_tokens: int | None) -> None:
    if max_tokens is None or max_tokens >= 1:
        return
    if max_tokens == 0:
        raise ConfigError(
            "max_tokens is 0; it must be at least 1 (0 has a meaning only with echo or "
            "prompt_logprobs, which are not supported yet)"
        )
    raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")

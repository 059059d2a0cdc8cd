"""Rejects sampling settings that cannot be honoured, each by name, value and limit.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

MAX_SEED = 2**64 - 1
MAX_PENALTY = 2.0
"""Largest presence and frequency penalty, either way; OpenAI's limit."""
MAX_LENGTH_PENALTY = 10.0
"""Largest either way: lengths to a larger power leave the range of floats."""
MAX_SALT_CHARS = 1024
"""Longest salt: up to 65,536 of them are kept with the prefixes that were evicted."""

_BOOLS = (
    "use_beam_search",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
    "use_prefix_cache",
)
_INTS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTS = ("best_of", "max_tokens", "logprobs", "prompt_logprobs", "seed")
_NUMBERS = (
    "length_penalty",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_DRAWING = (("top_p", 1.0), ("min_p", 0.0), ("typical_p", 1.0))


class FrozenDict(dict[Any, Any]):
    """A dict that cannot change; copies of it can be pickled, unlike those of a mapping proxy."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("settings of a request cannot change")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def freeze(name: str, value: Any) -> Any:
    """``value`` as a tuple or frozen dict: a caller's later change must not reach a request."""
    if value is None or (name == "stop" and isinstance(value, str)):
        return value
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a {type(value).__name__}; it must map ids to numbers")
        return FrozenDict(value)
    if not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{name} is a {type(value).__name__}; it must be a list")
    return tuple(value)


def check_settings(params: SamplingParams) -> None:
    """Raise ``ConfigError`` for the first setting that cannot be honoured."""
    _check_types(params)
    _check_counts(params)
    _check_ranges(params)
    check_salt(params.cache_salt)
    _check_stops(params)
    _check_lists(params)
    if params.use_beam_search:
        _check_beams(params)
    elif params.is_greedy and params.width > params.n:
        raise ConfigError(
            f"best_of is {params.best_of} with temperature 0; greedy candidates are all equal, "
            f"so it must be n, {params.n}"
        )


def check_salt(salt: str | None) -> None:
    """Raise ``ConfigError`` for a ``cache_salt`` that is too long to be kept."""
    if salt is not None and len(salt) > MAX_SALT_CHARS:
        raise ConfigError(
            f"cache_salt has {len(salt)} characters; it must have at most {MAX_SALT_CHARS}"
        )


def _check_types(params: SamplingParams) -> None:
    for name in _BOOLS:
        value = getattr(params, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; it must be True or False")
    for name in (*_INTS, *_OPTIONAL_INTS):
        value = getattr(params, name)
        if value is None and name in _OPTIONAL_INTS:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} is {value!r}; it must be an integer")
    for name in _NUMBERS:
        if not _is_number(getattr(params, name)):
            raise ConfigError(f"{name} is {getattr(params, name)!r}; it must be a number")
    if not isinstance(params.early_stopping, bool) and params.early_stopping != "never":
        raise ConfigError(
            f"early_stopping is {params.early_stopping!r}; it must be True, False or 'never'"
        )


def _check_counts(params: SamplingParams) -> None:
    if params.n < 1:
        raise ConfigError(f"n is {params.n}; it must be at least 1")
    if params.best_of is not None and params.best_of < params.n:
        raise ConfigError(f"best_of is {params.best_of}; it must be at least n, {params.n}")
    _check_max_tokens(params)
    if params.min_tokens < 0:
        raise ConfigError(f"min_tokens is {params.min_tokens}; it must be 0 or more")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ConfigError(
            f"min_tokens is {params.min_tokens}; it must not exceed max_tokens, {params.max_tokens}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; it must be 0 or more")
    if params.top_k < -1:
        raise ConfigError(f"top_k is {params.top_k}; it must be at least 1, or 0 or -1 for all")
    if params.seed is not None and not 0 <= params.seed <= MAX_SEED:
        raise ConfigError(f"seed is {params.seed}; it must be between 0 and {MAX_SEED}")


def _check_max_tokens(params: SamplingParams) -> None:
    if params.max_tokens is None or params.max_tokens >= 1:
        return
    if params.max_tokens < 0:
        raise ConfigError(f"max_tokens is {params.max_tokens}; it must be at least 1")
    if params.prompt_logprobs is None:
        raise ConfigError("max_tokens is 0; it must be at least 1 unless prompt_logprobs is set")
    if params.width > 1:
        raise ConfigError(
            f"max_tokens is 0 with {params.width} sequences; one of no tokens is all there is"
        )


def _check_ranges(params: SamplingParams) -> None:
    if not 0.0 <= params.temperature <= sys.float_info.max:
        raise ConfigError(f"temperature is {params.temperature}; it must be 0 or more, finite")
    for name in ("top_p", "typical_p"):
        value = getattr(params, name)
        if not 0.0 < value <= 1.0:
            raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")
    if not 0.0 <= params.min_p <= 1.0:
        raise ConfigError(f"min_p is {params.min_p}; it must be between 0 and 1")
    if not 0.0 < params.repetition_penalty <= sys.float_info.max:
        raise ConfigError(
            f"repetition_penalty is {params.repetition_penalty}; it must be above 0, finite"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            raise ConfigError(
                f"{name} is {value}; it must be between {-MAX_PENALTY} and {MAX_PENALTY}"
            )
    if not abs(params.length_penalty) <= MAX_LENGTH_PENALTY:
        raise ConfigError(
            f"length_penalty is {params.length_penalty}; it must be between "
            f"{-MAX_LENGTH_PENALTY} and {MAX_LENGTH_PENALTY}"
        )


def _check_stops(params: SamplingParams) -> None:
    if any(not isinstance(text, str) for text in params.stop_strings):
        raise ConfigError(f"stop is {params.stop!r}; it must be a string or strings")
    if "" in params.stop_strings:
        raise ConfigError("stop holds an empty string; every text would end before it")
    if params.stop_strings and not params.detokenize:
        raise ConfigError(f"stop is {params.stop!r}; stop strings need detokenize=True")
    for token_id in params.stop_token_ids or ():
        _check_token_id("stop_token_ids", token_id)


def _check_lists(params: SamplingParams) -> None:
    for token_id, bias in (params.logit_bias or {}).items():
        _check_token_id("logit_bias", token_id)
        if not _is_number(bias) or not math.isfinite(bias):
            raise ConfigError(f"logit_bias holds {bias!r}; biases are finite numbers")
    if params.allowed_token_ids == ():
        raise ConfigError("allowed_token_ids is empty; at least 1 token must be allowed")
    for token_id in params.allowed_token_ids or ():
        _check_token_id("allowed_token_ids", token_id)
    for word in params.bad_words or ():
        if not isinstance(word, str) or not word.strip():
            raise ConfigError(f"bad_words holds {word!r}; words are strings with text in them")
    for processor in params.logits_processors or ():
        if not callable(processor) or num_processor_args(processor) not in (2, 3):
            raise ConfigError(
                f"logits_processors holds {processor!r}; they are functions of "
                "(output_token_ids, logits) or (prompt_token_ids, output_token_ids, logits)"
            )


def _check_beams(params: SamplingParams) -> None:
    """A beam search draws nothing, so what shapes a draw has no meaning with it."""
    if params.width < 2:
        raise ConfigError(
            f"use_beam_search is set with a width of {params.width}; best_of (or n) must be at "
            "least 2"
        )
    if params.temperature not in (0.0, 1.0):
        raise ConfigError(
            f"temperature is {params.temperature} with use_beam_search; it must be 0 or 1"
        )
    for name, neutral in _DRAWING:
        value = getattr(params, name)
        if value != neutral:
            raise ConfigError(f"{name} is {value} with use_beam_search; it must be {neutral}")
    if params.top_k > 0:
        raise ConfigError(f"top_k is {params.top_k} with use_beam_search; it must be 0 or -1")
    if params.stop_strings:
        raise ConfigError(
            f"stop is {params.stop!r} with use_beam_search; only stop_token_ids can end a beam"
        )


def num_processor_args(processor: Callable[..., Any]) -> int:
    """Positional parameters of a user's logits processor without a default; 2 if unknown."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):
        return 2
    return sum(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
    )


def _check_token_id(name: str, token_id: Any) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        raise ConfigError(f"{name} holds {token_id!r}; ids are integers from 0")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float)

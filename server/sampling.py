"""From a request's fields to the engine's sampling settings.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from typing import Any

from ..engine import ConfigError, RequestOutputKind, SamplingParams, StructuredOutputsParams
from .errors import ApiError, invalid_field, renamed_error
from .protocol.sampling import SamplingFields
from .protocol.structured import ResponseFormat, StructuredOutputs

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "n",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "skip_special_tokens",
    "cache_salt",
    "use_prefix_cache",
)
"""Fields that the engine takes as they come."""

_FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_KINDS = ("json", "regex", "choice", "grammar")

MAX_FORM_CHARS = 1 << 16
"""Longest schema, pattern or grammar, and all choices together: all requests wait while the engine
compiles one."""


def value(body: SamplingFields, name: str) -> Any:
    """A field, or its default if it is null."""
    given = getattr(body, name)
    return type(body).model_fields[name].get_default() if given is None else given


def sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structured_outputs: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """The settings that a request asks for.

    Streams report what is new, other requests their end only.

    Args:
        max_tokens: most tokens to generate; None: as many as the context holds.
        logprobs: likeliest tokens to report at each generated one.
        prompt_logprobs: the same for the prompt, beside what the body's own field asks for.
        structured_outputs: a form that something else than the body's own fields asks for.

    Raises ``ApiError`` and ``ConfigError``.
    """
    check_stream(body)
    settings = {name: value(body, name) for name in _SAME_NAME}
    wanted = [num for num in (prompt_logprobs, body.prompt_logprobs) if num is not None]
    return SamplingParams(
        **settings,
        best_of=_width(body),
        seed=None if body.seed is None else body.seed % 2**64,
        logit_bias=_logit_bias(body),
        structured_outputs=_form(body, structured_outputs),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=max(wanted, default=None),
        output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
    )


def check_stream(body: SamplingFields) -> None:
    """Raise ``ApiError`` for fields that only a stream has, and for those that it cannot have."""
    if not body.stream:
        if body.stream_options is not None:
            raise invalid_field("stream_options", "is set without stream")
        return
    if body.use_beam_search:
        raise invalid_field(
            "use_beam_search", "is set with stream; which beam is best is known at the end only"
        )
    if body.best_of is not None and body.best_of > value(body, "n"):
        raise invalid_field(
            "best_of",
            f"is {body.best_of} with stream and n {value(body, 'n')}; which candidates are best is "
            "known at the end only, so it must be n",
        )
    if body.prompt_logprobs is not None:
        raise invalid_field("prompt_logprobs", "is set with stream; use echo and logprobs there")


def check_room(
    max_tokens: int | None,
    num_prompt_tokens: int,
    max_model_len: int,
    *,
    name: str = "max_tokens",
    prompt_name: str = "prompt",
) -> None:
    """Raise ``ApiError`` unless the context holds prompt and answer.

    ``name`` and ``prompt_name``: the fields that they came from.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"{prompt_name} has {num_prompt_tokens} tokens; at most {max_model_len - 1} leave room "
            f"for an answer in the model's context of {max_model_len}",
            param=prompt_name,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"{name} is {max_tokens}; the prompt's {num_prompt_tokens} tokens leave room for "
            f"{room} in the model's context of {max_model_len}",
            param=name,
            code="context_length_exceeded",
        )


def _width(body: SamplingFields) -> int | None:
    if not body.use_beam_search:
        for name in ("beam_width", "length_penalty", "early_stopping"):
            if value(body, name) != type(body).model_fields[name].get_default():
                raise invalid_field(name, f"is {getattr(body, name)!r} without use_beam_search")
        return body.best_of
    if body.beam_width is None:
        return body.best_of
    if body.best_of not in (None, body.beam_width):
        raise invalid_field("beam_width", f"is {body.beam_width} and best_of is {body.best_of}")
    if body.beam_width < value(body, "n"):
        raise invalid_field("beam_width", f"is {body.beam_width}; it must be at least n, {body.n}")
    return body.beam_width


def _logit_bias(body: SamplingFields) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    return {int(token_id): float(bias) for token_id, bias in body.logit_bias.items()}


def form_names(body: SamplingFields) -> dict[str, str]:
    """What the body calls the form that the engine knows as ``json``, ``regex`` and so on."""
    names: dict[str, str] = {}
    for name in _FORMS:
        if getattr(body, name) is not None:
            names |= _engine_names(name)
    return names


def _engine_names(name: str) -> dict[str, str]:
    if name == "response_format":
        return {"json": "response_format.json_schema.schema"}
    if name == "structured_outputs":
        return {kind: f"{name}.{kind}" for kind in _KINDS}
    return {name.removeprefix("guided_"): name}


def _form(
    body: SamplingFields, other: StructuredOutputsParams | None
) -> StructuredOutputsParams | None:
    """The one form that the text must have."""
    forms: dict[str, StructuredOutputsParams] = {}
    for name in _FORMS:
        form = _read_form(name, getattr(body, name))
        if form is not None:
            forms[name] = form
    if len(forms) > 1:
        first, second = list(forms)[:2]
        raise invalid_field(second, f"is set beside {first}; a text has one form")
    if forms and other is not None:
        raise invalid_field(next(iter(forms)), "is set although the text has a form already")
    return next(iter(forms.values()), other)


def _read_form(name: str, given: Any) -> StructuredOutputsParams | None:
    try:
        form = _make_form(name, given)
    except ConfigError as error:
        raise renamed_error(error, _engine_names(name)) from error
    if form is not None and form.kind != "json_object":
        content = getattr(form, form.kind)
        num_chars = len(content) if isinstance(content, str) else sum(map(len, content))
        if num_chars > MAX_FORM_CHARS:
            raise invalid_field(
                _engine_names(name)[form.kind],
                f"has {num_chars} characters; at most {MAX_FORM_CHARS}",
            )
    return form


def _make_form(name: str, given: Any) -> StructuredOutputsParams | None:
    if given is None:
        return None
    if isinstance(given, ResponseFormat):
        return _response_format(given)
    if isinstance(given, StructuredOutputs):
        return StructuredOutputsParams(
            json=given.json_,
            regex=given.regex,
            choice=given.choice,
            grammar=given.grammar,
            json_object=bool(given.json_object),
        )
    return StructuredOutputsParams(**{name.removeprefix("guided_"): given})


def _response_format(given: ResponseFormat) -> StructuredOutputsParams | None:
    if (given.json_schema is not None) != (given.type == "json_schema"):
        what = "is missing" if given.json_schema is None else "is set"
        raise invalid_field("response_format.json_schema", f"{what} with the type {given.type}")
    if given.json_schema is not None:
        return StructuredOutputsParams(json=given.json_schema.schema_)
    return StructuredOutputsParams(json_object=True) if given.type == "json_object" else None

"""Types of fields that pydantic has no good words, or no bounds, for.

A list of a million wrong entries gets one error here, not a million.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NoReturn

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 4
"""OpenAI's limit."""
MAX_BAD_WORDS = 256
"""Each is tokenised twice where the engine computes, so it cannot be any number."""
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIAS = 100.0
"""Largest either way; OpenAI's limit."""
MAX_ID_DIGITS = 10
_HALF_PAIR = re.compile("[\ud800-\udfff]")
MAX_PROMPTS = 1024
"""Most prompts of one request; vLLM's limit."""


def refuse(message: str, **context: Any) -> NoReturn:
    """Raise what pydantic reports as a wrong value; ``{name}`` in the message is filled in."""
    raise PydanticCustomError("invalid_value", message, context)


def _read_stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts):
        refuse("must be a string or a list of strings")
    if len(texts) > MAX_STOP_STRINGS:
        refuse("has {num} strings; at most {most}", num=len(texts), most=MAX_STOP_STRINGS)
    if "" in texts:
        refuse("holds an empty string; every text would end before it")
    if any(_HALF_PAIR.search(text) for text in texts):
        refuse("holds half a surrogate pair; no text would ever end with it")
    return value


def _read_token_ids(value: Any) -> Any:
    return None if value is None else _read_required_token_ids(value)


def _read_required_token_ids(value: Any) -> Any:
    if not isinstance(value, list):
        refuse("must be a list of token ids")
    for token_id in value:
        if type(token_id) is not int or token_id < 0:
            refuse("holds {id}; token ids are integers from 0", id=repr(token_id)[:80])
    return value


def _read_bad_words(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, list):
        refuse("must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        refuse("has {num} words; at most {most}", num=len(value), most=MAX_BAD_WORDS)
    for word in value:
        if not isinstance(word, str) or not word.strip() or len(word) > MAX_BAD_WORD_CHARS:
            refuse(
                "holds {word}; words are strings of 1 to {most} characters with text in them",
                word=repr(word)[:80],
                most=MAX_BAD_WORD_CHARS,
            )
    return value


def _read_logit_bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        refuse("must map token ids to numbers")
    for key, bias in value.items():
        is_id = isinstance(key, str) and key.isascii() and key.isdigit()
        if not is_id or len(key) > MAX_ID_DIGITS:
            refuse("holds the key {key}; keys are token ids in digits", key=repr(key)[:80])
        is_number = type(bias) in (int, float)
        if not is_number or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            refuse(
                "holds {bias} for token {key}; it must be a number between {least} and {most}",
                bias=repr(bias)[:80],
                key=key,
                least=-MAX_LOGIT_BIAS,
                most=MAX_LOGIT_BIAS,
            )
    if len({int(key) for key in value}) < len(value):
        refuse("names a token twice, once with zeros before it")
    return value


def _read_early_stopping(value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and value != "never":
        refuse("must be true, false or 'never'")
    return value


def _read_schema(value: Any) -> Any:
    if value is not None and not isinstance(value, str | dict):
        refuse("must be a JSON schema: an object, or its text")
    return value


def _read_prompts(value: Any) -> Any:
    """One prompt or several, as a list of prompts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        refuse(_PROMPT_SHAPES)
    if not value:
        refuse("is an empty list; it must hold at least 1 prompt, or 1 token id")
    if not isinstance(value[0], str | list):
        value = [value]
    if len(value) > MAX_PROMPTS:
        refuse("holds {num} prompts; at most {most}", num=len(value), most=MAX_PROMPTS)
    for idx, prompt in enumerate(value):
        _check_prompt(prompt, type(value[0]), idx)
    return value


def _check_prompt(prompt: Any, kind: type[Any], idx: int) -> None:
    if type(prompt) is not kind:
        refuse(_PROMPT_SHAPES + ", all of one kind")
    if not prompt:
        refuse("is empty at {idx}; a prompt has at least 1 character or token", idx=idx)
    if kind is list:
        _read_required_token_ids(prompt)


_PROMPT_SHAPES = "must be a text, a list of texts, a list of token ids or a list of these"

_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _nullable(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"type": "null"}]})


StopStrings = Annotated[
    str | list[str] | None,
    PlainValidator(_read_stop),
    _nullable(
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "maxItems": MAX_STOP_STRINGS,
        },
    ),
]
TokenIds = Annotated[list[int] | None, PlainValidator(_read_token_ids), _nullable(_IDS_SCHEMA)]
TokenIdList = Annotated[
    list[int], PlainValidator(_read_required_token_ids), WithJsonSchema(_IDS_SCHEMA)
]
BadWords = Annotated[
    list[str] | None,
    PlainValidator(_read_bad_words),
    _nullable(
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARS},
            "maxItems": MAX_BAD_WORDS,
        }
    ),
]
LogitBias = Annotated[
    dict[str, float] | None,
    PlainValidator(_read_logit_bias),
    _nullable(
        {
            "type": "object",
            "propertyNames": {"pattern": f"^[0-9]{{1,{MAX_ID_DIGITS}}}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": -MAX_LOGIT_BIAS,
                "maximum": MAX_LOGIT_BIAS,
            },
        }
    ),
]
EarlyStopping = Annotated[
    bool | Literal["never"] | None,
    PlainValidator(_read_early_stopping),
    _nullable({"type": "boolean"}, {"const": "never"}),
]
SchemaOrText = Annotated[
    str | dict[str, Any] | None,
    PlainValidator(_read_schema),
    _nullable({"type": "object"}, {"type": "string"}),
]
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_read_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
                {**_IDS_SCHEMA, "minItems": 1},
                {
                    "type": "array",
                    "items": {**_IDS_SCHEMA, "minItems": 1},
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                },
            ]
        }
    ),
]

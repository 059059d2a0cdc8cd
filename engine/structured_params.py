"""What the text of a request must look like; names follow vLLM.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a request's text: exactly one of these. Anything else raises ``ConfigError``.

    The text is the whole answer: it starts where the prompt ends and the request ends with it.
    Patterns and grammars are only compiled, and refused, where a request is added.

    Attributes:
        json: a JSON schema: text, a dict, or a class with ``model_json_schema`` (pydantic). Kept
            as text, so a caller's later change does not reach a running request. Keywords that
            llguidance cannot enforce are refused; white space between tokens of the JSON is free,
            up to 64 characters in a row.
        regex: a regular expression that the whole text matches (Rust ``regex`` syntax).
        choice: the text is one of these strings.
        grammar: a Lark grammar as llguidance reads it, or GBNF/EBNF with ``root ::= ...``.
        json_object: the text is any JSON object.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise ConfigError(f"json_object is {self.json_object!r}; it must be True or False")
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs has {', '.join(given) or 'nothing'}; exactly one of "
                f"{', '.join(KINDS)} must be set"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {value!r}; it must be a string that is not empty")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def kind(self) -> str:
        """Name of the attribute that is set."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def _schema_text(schema: Any) -> str:
    """A JSON schema as text. Raises ``ConfigError`` if it is none."""
    if isinstance(schema, str):
        try:
            schema = json_module.loads(schema)
        except ValueError as error:
            raise ConfigError(f"json is not the text of a JSON schema: {error}") from error
    elif hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping):
        raise ConfigError(
            f"json is a {type(schema).__name__}; it must be a JSON schema: text, a dict or a "
            "pydantic class"
        )
    try:
        return json_module.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json is not a JSON schema: {error}") from error


def _choices(choices: Any) -> tuple[str, ...]:
    if not isinstance(choices, list | tuple) or not choices:
        raise ConfigError(f"choice is {choices!r}; it must be a list of at least 1 string")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ConfigError(f"choice holds {choice!r}; choices are strings that are not empty")
    return tuple(choices)

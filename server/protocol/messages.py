"""The messages of a chat.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from .base import ApiRequest, unsupported
from .json_value import is_unicode
from .tools import SentToolCall

_OTHER_PARTS = (
    "image_url",
    "input_image",
    "input_audio",
    "audio_url",
    "video_url",
    "file",
    "input_file",
    "refusal",
)


def read_content(value: Any, part_types: tuple[str, ...], extra: frozenset[str]) -> str | None:
    """Text of a message: a string, or the texts of a list of parts with line breaks between.

    ``extra``: fields that parts may have besides and that say nothing to a model.
    """
    if isinstance(value, list):
        parts = enumerate(value)
        value = "\n".join(_read_part(idx, part, part_types, extra) for idx, part in parts)
    if value is not None and not isinstance(value, str):
        raise PydanticCustomError("invalid_value", "must be a string or a list of text parts")
    if value is not None and not is_unicode(value):
        raise PydanticCustomError("invalid_value", "holds half a surrogate pair")
    return value


def _read_part(idx: int, part: Any, part_types: tuple[str, ...], extra: frozenset[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    where: dict[str, Any] = {"idx": idx, "kind": f"{kind!r:.80}", "known": ", ".join(part_types)}
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise PydanticCustomError(
            "unsupported_parameter", "not supported: part {idx} is of type {kind}", where
        )
    if kind not in part_types:
        raise PydanticCustomError(
            "invalid_value", "part {idx} is of type {kind}; supported: {known}", where
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise PydanticCustomError("invalid_value", "part {idx} has no text", where)
    for name in part:
        if name not in ("type", "text") and name not in extra:
            raise PydanticCustomError(
                "invalid_value",
                "part {idx} has {name}, which is not a known parameter",
                {**where, "name": f"{name!r:.80}"},
            )
    return text


def content_schema(*part_types: str, **extra: Any) -> WithJsonSchema:
    """The OpenAPI schema of ``read_content``."""
    part = {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": list(part_types)},
            "text": {"type": "string"},
            **extra,
        },
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    return WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": part}, {"type": "null"}]}
    )


Content = Annotated[
    str | None,
    PlainValidator(lambda value: read_content(value, ("text",), frozenset())),
    content_schema("text"),
]


class ChatMessage(ApiRequest):
    """One message. What the fields of a role may be is checked where it is rendered."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(None, description="text, or a list of text parts")
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = Field(
        None, description="whose message it is, where the chat template shows it"
    )
    tool_calls: Annotated[list[SentToolCall], Field(fail_fast=True)] | None = Field(
        None, description="calls that an assistant's message made"
    )
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="the call that a tool's message answers"
    )
    refusal: unsupported("refusals are text") = None  # type: ignore[valid-type]
    audio: unsupported("messages are text") = None  # type: ignore[valid-type]
    annotations: unsupported("messages are text", []) = None  # type: ignore[valid-type]
    function_call: unsupported("use tool_calls") = None  # type: ignore[valid-type]

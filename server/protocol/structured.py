"""What a request says about the form of its answer, in OpenAI's words and in vLLM's.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import ApiRequest, accepted, unsupported
from .values import SchemaOrText

MAX_CHOICES = 1024

Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]
_Text = Annotated[str, Field(min_length=1)]


class JsonSchemaFormat(ApiRequest):
    """A JSON schema, as OpenAI wraps it."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = accepted(
        ..., description="what the schema is called"
    )
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema of the text")
    description: str | None = accepted(description="what the schema is for")
    strict: bool | None = accepted(description="every schema is enforced")


class ResponseFormat(ApiRequest):
    """OpenAI's form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="any text, any JSON object, or what `json_schema` describes"
    )
    json_schema: JsonSchemaFormat | None = Field(
        None, description="required with, and only with, the type `json_schema`"
    )


class StructuredOutputs(ApiRequest):
    """vLLM's form of an answer: exactly one of the honoured fields."""

    json_: SchemaOrText = Field(None, alias="json", description="the text is JSON of this schema")
    regex: _Text | None = Field(None, description="the whole text matches")
    choice: Choices | None = Field(None, description="the text is one of these")
    grammar: _Text | None = Field(None, description="the text follows a Lark or GBNF grammar")
    json_object: bool | None = Field(None, description="the text is any JSON object")
    disable_fallback: bool | None = accepted(description="there is one way to enforce a form")
    disable_any_whitespace: unsupported(  # type: ignore[valid-type]
        "white space between the tokens of JSON is free", False
    ) = None
    disable_additional_properties: unsupported(  # type: ignore[valid-type]
        "say so in the schema", False
    ) = None
    whitespace_pattern: unsupported(  # type: ignore[valid-type]
        "white space between the tokens of JSON is free"
    ) = None
    structural_tag: unsupported(  # type: ignore[valid-type]
        "the whole text has a form, or none has"
    ) = None

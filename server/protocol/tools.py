"""Tools that a model may call, and the calls that it makes.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from .base import ApiRequest, ApiResponse, accepted
from .json_value import JsonObject

MAX_TOOLS = 128
"""OpenAI's limit."""

NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"

ToolName = Annotated[str, Field(pattern=NAME_PATTERN)]


class FunctionDefinition(ApiRequest):
    """A function of the client's."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(
        None, description="JSON schema of the arguments; null: there are none"
    )
    strict: bool | None = Field(
        None, description="arguments always follow the schema, also where the model may choose"
    )


class Tool(ApiRequest):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(ApiRequest):
    """The name of a tool."""

    name: ToolName


class NamedTool(ApiRequest):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


def _read_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        # Bodies of both endpoints: a chat wraps the name once more.
        name = value.get("name") if "name" in value else value.get("function")
        if isinstance(name, dict) and set(name) == {"name"}:
            name = name["name"]
        is_known = set(value) in ({"type", "name"}, {"type", "function"})
        if value.get("type") == "function" and is_known and isinstance(name, str):
            return NamedTool(type="function", function=NamedFunction.model_construct(name=name))
    raise PydanticCustomError(
        "invalid_value", "must be none, auto, required, or the function that is to be called"
    )


def _choice_schema(named: dict[str, Any]) -> WithJsonSchema:
    texts = {"type": "string", "enum": ["none", "auto", "required"]}
    return WithJsonSchema({"anyOf": [texts, named, {"type": "null"}]})


_NAME = {"type": "string", "pattern": NAME_PATTERN}
_FUNCTION = {"const": "function", "type": "string"}
_NAMED = {
    "type": "object",
    "properties": {"name": _NAME},
    "required": ["name"],
    "additionalProperties": False,
}

ToolChoice = Annotated[
    NamedTool | str | None,
    PlainValidator(_read_choice),
    _choice_schema(
        {
            "type": "object",
            "properties": {"type": _FUNCTION, "function": _NAMED},
            "required": ["type", "function"],
            "additionalProperties": False,
        }
    ),
]
"""As chats write it: ``{"type": "function", "function": {"name": ...}}``."""

FlatToolChoice = Annotated[
    NamedTool | str | None,
    PlainValidator(_read_choice),
    _choice_schema(
        {
            "type": "object",
            "properties": {"type": _FUNCTION, "name": _NAME},
            "required": ["type", "name"],
            "additionalProperties": False,
        }
    ),
]
"""As responses write it: ``{"type": "function", "name": ...}``."""


class SentFunctionCall(ApiRequest):
    """A call in an earlier message."""

    name: ToolName
    arguments: str = Field(description="a JSON object as text")


class SentToolCall(ApiRequest):
    """A call in an earlier message, with its name."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: SentFunctionCall
    index: int | None = accepted(description="calls are in their order")


class FunctionCall(ApiResponse):
    """A call that the model made."""

    name: str
    arguments: str


class ToolCall(ApiResponse):
    """A call that the model made, with the name that its answer must give."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

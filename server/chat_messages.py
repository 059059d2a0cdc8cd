"""From a request's messages to what a chat template reads.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ApiError, invalid_field
from .protocol.json_value import read_json_object
from .protocol.messages import ChatMessage
from .protocol.tools import SentToolCall
from .template_source import TemplateSource


def template_messages(
    messages: Sequence[ChatMessage], places: Sequence[str], template: TemplateSource
) -> list[dict[str, Any]]:
    """The messages as plain values; the arguments of calls are objects, as templates want them.

    A ``developer`` is a ``system`` to templates that do not know one. ``places``: what each message
    is called in the request.

    Raises ``ApiError`` for fields that a role does not have, and for messages about tools where
    the template cannot show them.
    """
    return [
        _template_message(message, place, template)
        for message, place in zip(messages, places, strict=True)
    ]


def _template_message(message: ChatMessage, where: str, template: TemplateSource) -> dict[str, Any]:
    role = message.role
    if role == "developer" and not template.has_developer:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        plain["name"] = message.name
    _check_role(message, where)
    if message.tool_calls:
        if not template.has_tool_calls:
            raise _no_tools(f"{where}.tool_calls", "is set")
        plain["tool_calls"] = [
            _template_call(call, f"{where}.tool_calls.{idx}")
            for idx, call in enumerate(message.tool_calls)
        ]
    if role == "tool":
        if not template.has_tool_messages:
            raise _no_tools(f"{where}.role", "is 'tool'")
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _check_role(message: ChatMessage, where: str) -> None:
    """Raise ``ApiError`` unless the fields are those of the role."""
    if message.content is None and not message.tool_calls:
        raise invalid_field(f"{where}.content", "is missing")
    if message.tool_calls is not None and message.role != "assistant":
        raise invalid_field(f"{where}.tool_calls", f"is set in a message of the {message.role}'s")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        what = "is missing" if message.tool_call_id is None else "is set"
        raise invalid_field(f"{where}.tool_call_id", f"{what} in a message of the {message.role}'s")


def _template_call(call: SentToolCall, where: str) -> dict[str, Any]:
    arguments = read_json_object(call.function.arguments)
    if arguments is None:
        raise invalid_field(
            f"{where}.function.arguments",
            f"is {call.function.arguments!r:.100}; it must be a JSON object as text",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _no_tools(param: str, what: str) -> ApiError:
    return ApiError(
        400,
        f"{param} {what}; the model's chat template knows no tools",
        param=param,
        code="unsupported_parameter",
    )

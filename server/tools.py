"""The tools of one request: what the model is told, and what form its answer must have.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import StructuredOutputsParams
from .errors import ApiError, invalid_field
from .protocol.tools import MAX_TOOLS, FunctionDefinition, NamedTool
from .template_source import TemplateSource, ToolFormat

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, which is what models were shown."""


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How tools take part in one request.

    Attributes:
        names: tools that may be called.
        format: how the model writes a call.
        definitions: what the chat template gets.
        form: the form of the whole answer; None: any text, in which calls are looked for.
        max_calls: calls after which the rest is left out; None: any number.
    """

    names: frozenset[str]
    format: ToolFormat
    definitions: list[dict[str, Any]]
    form: StructuredOutputsParams | None
    max_calls: int | None


def plan_tools(
    functions: Sequence[FunctionDefinition] | None,
    choice: NamedTool | str | None,
    template: TemplateSource,
    *,
    has_parallel_calls: bool = True,
    function_place: str = "function.",
) -> ToolPlan | None:
    """The plan of a request's ``tools`` and ``tool_choice``; None: no tool takes part.

    ``"auto"``, the default, leaves the answer free; with a ``strict`` tool, its calls are kept to
    the schemas. ``"required"`` makes the whole answer calls, a named tool one call of it.

    ``function_place``: where in a tool its function is.

    Raises ``ApiError`` for tools that cannot be, and where the chat template knows none.
    """
    if not functions:
        if choice not in (None, "none"):
            raise invalid_field("tool_choice", "is set without tools")
        return None
    _check_names(functions, function_place)
    if choice == "none":
        return None
    tool_format = template.tool_format
    if tool_format is None:
        reason = "writes calls in a form of its own" if template.has_tools else "knows no tools"
        raise ApiError(
            400,
            f"tools is set; the model's chat template {reason}",
            param="tools",
            code="unsupported_parameter",
        )
    callable_tools = list(functions)
    if isinstance(choice, NamedTool):
        name = choice.function.name
        callable_tools = [one for one in functions if one.name == name]
        if not callable_tools:
            raise invalid_field("tool_choice", f"names {name!r}, which is not among the tools")
    is_single = isinstance(choice, NamedTool) or not has_parallel_calls
    return ToolPlan(
        names=frozenset(one.name for one in callable_tools),
        format=tool_format,
        definitions=[_definition(one) for one in functions],
        form=_form(callable_tools, tool_format, choice, is_single),
        max_calls=1 if is_single else None,
    )


def _check_names(functions: Sequence[FunctionDefinition], place: str) -> None:
    if len(functions) > MAX_TOOLS:
        raise invalid_field("tools", f"has {len(functions)} entries; at most {MAX_TOOLS}")
    seen: set[str] = set()
    for idx, function in enumerate(functions):
        if function.name in seen:
            raise invalid_field(
                f"tools.{idx}.{place}name", f"is {function.name!r}, as another's is"
            )
        seen.add(function.name)


def _definition(function: FunctionDefinition) -> dict[str, Any]:
    """OpenAI's definition, as templates were written for; ``strict`` is none of the model's."""
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    told["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": told}


def _form(
    functions: Sequence[FunctionDefinition],
    tool_format: ToolFormat,
    choice: NamedTool | str | None,
    is_single: bool,
) -> StructuredOutputsParams | None:
    is_forced = choice not in (None, "auto")
    if not is_forced and not any(one.strict for one in functions):
        return None
    call = json.dumps(_call_schema(functions, tool_format, only_strict=not is_forced))
    if tool_format.has_tags:
        grammar = _tagged_grammar(call, is_forced, is_single)
    elif is_forced:
        grammar = f"start: %json {call}\n"
    else:
        grammar = f"start: call | TEXT\ncall: %json {call}\nTEXT: /([^{{](.|\\n)*)?/\n"
    return StructuredOutputsParams(grammar=grammar)


def _tagged_grammar(call: str, is_forced: bool, is_single: bool) -> str:
    """Calls between tags: one or several lines of nothing else, or wherever the model likes."""
    if is_forced:
        more = "" if is_single else ' ("\\n" call)*'
        return (
            f'start: call{more}\ncall: "{OPEN_TAG}\\n" body "\\n{CLOSE_TAG}"\nbody: %json {call}\n'
        )
    return (
        f"start: {'call?' if is_single else 'call*'} TEXT\n"
        f'call: open "\\n"? body "\\n"? "{CLOSE_TAG}"\n'
        f'open[lazy]: TEXT "{OPEN_TAG}"\n'
        "TEXT: /(.|\\n)*/\n"
        f"body: %json {call}\n"
    )


def _call_schema(
    functions: Sequence[FunctionDefinition], tool_format: ToolFormat, *, only_strict: bool
) -> dict[str, Any]:
    """The schema of one call of any of the functions."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for idx, function in enumerate(functions):
        parameters = function.parameters or {"type": "object", "additionalProperties": False}
        if only_strict and not function.strict:
            parameters = {"type": "object"}
        definitions[f"tool_{idx}"] = _move_references(parameters, f"#/$defs/tool_{idx}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    tool_format.arguments_key: {"$ref": f"#/$defs/tool_{idx}"},
                },
                "required": ["name", tool_format.arguments_key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions, "x-guidance": _SPACING}


def _move_references(schema: Any, root: str) -> Any:
    """A schema's references to its own parts, where it is now a part itself."""
    if isinstance(schema, list):
        return [_move_references(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + one[1:]
        if key == "$ref" and isinstance(one, str) and one.startswith("#")
        else _move_references(one, root)
        for key, one in schema.items()
    }

"""Fill in the tables of docs/openai-api.md: endpoints, and every field of every request.

Owns: the generated parts of the page.  Thread-safety: none; one process.

The tables come from the pydantic models that read the requests, so they say what the server does.

    python scripts/list_api_fields.py           # write the page
    python scripts/list_api_fields.py --check   # exit 1 and show a diff if it is out of date
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when libgomp loads, so before torch

import typer

from vmalloc.engine import AsyncLLMEngine
from vmalloc.server.app import create_app
from vmalloc.server.config import ServerConfig
from vmalloc.server.state import ServerState

PAGE = Path(__file__).resolve().parents[1] / "docs" / "openai-api.md"
COMMAND = "python scripts/list_api_fields.py"
EXIT_OUT_OF_DATE = 1

GENERATING = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
}
UNKNOWN = "-"
CLASS_KEY = "x-vmalloc-class"


@dataclass(frozen=True)
class RequestField:
    """One field of a request.

    Attributes:
        path: its name, with those of the objects that it is in.
        kind: ``"honoured"``, ``"accepted"`` or ``"unsupported"``.
        values: what it may be.
        meaning: what it does, or why it does nothing.
    """

    path: str
    kind: str
    values: str
    meaning: str


def description() -> dict[str, Any]:
    """``/openapi.json``; nothing is loaded for it."""
    engine = AsyncLLMEngine(lambda phases: _never())
    app = create_app(ServerState(engine, ServerConfig(), model="demo", created=0))
    return app.openapi()


def _never() -> Any:
    raise AssertionError("the engine was started")


def request_fields(api: dict[str, Any], path: str, method: str = "post") -> list[RequestField]:
    """The fields of an operation's body, in order; none if it has no body."""
    operation = api["paths"][path].get(method, {})
    body = operation.get("requestBody")
    if body is None:
        return []
    return list(_walk(api, body["content"]["application/json"]["schema"], ""))


def _walk(api: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[RequestField]:
    model = _resolve(api, schema)
    for name, field in model.get("properties", {}).items():
        path = f"{prefix}{name}"
        kind = field.get(CLASS_KEY, "honoured")
        yield RequestField(path, kind, _values(api, field, kind), _meaning(field, kind))
        if kind == "unsupported":
            continue
        for part in _parts(api, field):
            yield from _walk(api, part, f"{path}.")


def _parts(api: dict[str, Any], field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The models inside a field: objects, and entries of lists."""
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            if "properties" in _resolve(api, option):
                yield option
        elif option.get("type") == "array" or "anyOf" in option:
            yield from _parts(api, option.get("items", option))


def _resolve(api: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: dict[str, Any] = api["components"]["schemas"][reference.rsplit("/", 1)[-1]]
    return found


def _meaning(field: dict[str, Any], kind: str) -> str:
    text: str = field.get("description", "")
    if kind == "accepted":
        return f"no effect: {text}"
    return text


def _values(api: dict[str, Any], field: dict[str, Any], kind: str) -> str:
    if kind == "unsupported":
        neutral = [f"`{json.dumps(value)}`" for value in field["enum"] if value is not None]
        return "only null" + "".join(f" or {value}" for value in neutral)
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    names = dict.fromkeys(_type_name(api, option) for option in options)
    text = " or ".join(names)
    default = field.get("default")
    if default is not None:
        text += f", default `{json.dumps(default)}`"
    return text


def _type_name(api: dict[str, Any], schema: dict[str, Any]) -> str:
    schema = _resolve(api, schema)
    if "enum" in schema or "const" in schema:
        return ", ".join(
            f"`{json.dumps(one)}`" for one in schema.get("enum", [schema.get("const")])
        )
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type_name(api, one) for one in schema["anyOf"]))
    kind = schema.get("type", "any")
    if kind == "array":
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list of {_type_name(api, schema.get('items', {}))}{most}"
    if kind in ("integer", "number"):
        return kind + _range(schema)
    return str(kind)


def _range(schema: dict[str, Any]) -> str:
    limits = []
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤")):
        if key in schema:
            value = schema[key]
            limits.append(f"{sign} {_power(value)}")
    return " " + ", ".join(limits) if limits else ""


def _power(value: float) -> str:
    for bits in (31, 63, 64):
        for offset, suffix in ((0, ""), (-1, "-1")):
            if abs(value) == 2**bits + offset:
                return f"{'-' if value < 0 else ''}2^{bits}{suffix}"
    return f"{value:g}"


def endpoint_table(api: dict[str, Any]) -> str:
    """What there is, and what it answers."""
    lines = ["| | path | | statuses |", "|---|---|---|---|"]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            text = " ".join(operation.get("description", "").split())
            statuses = " ".join(sorted(operation["responses"]))
            lines.append(f"| {method.upper()} | `{path}` | {text} | {statuses} |")
    return "\n".join(lines)


def field_table(api: dict[str, Any]) -> str:
    """The fields of the endpoints that generate, beside each other."""
    fields = {path: {one.path: one for one in request_fields(api, path)} for path in GENERATING}
    names = dict.fromkeys(name for own in fields.values() for name in own)
    lines = [
        f"| field | {' | '.join(GENERATING.values())} | values | |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        classes = [own[name].kind if name in own else UNKNOWN for own in fields.values()]
        values = _merged({path: own[name].values for path, own in fields.items() if name in own})
        meaning = _merged({path: own[name].meaning for path, own in fields.items() if name in own})
        lines.append(f"| `{name}` | {' | '.join(classes)} | {values} | {meaning} |")
    return "\n".join(lines)


def _merged(texts: dict[str, str]) -> str:
    """What endpoints have in common once, what differs under their names."""
    by_text: dict[str, list[str]] = {}
    for path, text in texts.items():
        by_text.setdefault(text, []).append(GENERATING[path])
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"*{', '.join(names)}:* {text}" for text, names in by_text.items() if text)


def other_table(api: dict[str, Any]) -> str:
    """The fields of all other bodies."""
    lines = ["| path | field | | values | |", "|---|---|---|---|---|"]
    for path in api["paths"]:
        if path not in GENERATING:
            for one in request_fields(api, path):
                lines.append(
                    f"| `{path}` | `{one.path}` | {one.kind} | {one.values} | {one.meaning} |"
                )
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with fresh tables."""
    api = description()
    for name, make in (
        ("endpoints", endpoint_table),
        ("fields", field_table),
        ("other fields", other_table),
    ):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        table = make(api) + "\n"
        page, count = pattern.subn(lambda _, text=begin + table + end: text, page)
        assert count == 1, f"the page has {count} places for {name}"
    return page


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if the page is out of date.")
    ] = False,
) -> None:
    """Fill in the tables of docs/openai-api.md."""
    old = PAGE.read_text(encoding="utf-8")
    fresh = render(old)
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
        return
    if fresh != old:
        diff = difflib.unified_diff(old.splitlines(), fresh.splitlines(), "page", "fresh", "", "")
        print("\n".join(diff))
        print(f"docs/openai-api.md is out of date; run: {COMMAND}")
        raise typer.Exit(EXIT_OUT_OF_DATE)


if __name__ == "__main__":
    typer.run(main)

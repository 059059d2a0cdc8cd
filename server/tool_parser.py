"""Finds the calls of tools in an answer, as the text comes.

Owns: text of one answer that is not yet known to be a call.  Thread-safety: none.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .protocol.json_value import read_json_object
from .tools import CLOSE_TAG, OPEN_TAG, ToolPlan

_KEYS = ("arguments", "parameters")


def new_call_id() -> str:
    """A name that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call that was found whole; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str
    id: str = field(default_factory=new_call_id)


class ToolParser:
    """Tells calls from text in one answer.

    A call appears in one piece once it is whole. However the text is cut into pieces, the same
    comes out. What looks like a call and is none (cut off, no JSON, an unknown tool) is text. White
    space around calls belongs to them. Calls beyond the plan's ``max_calls`` are left out.
    """

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._has_tags = plan.format.has_tags
        self._buffer = ""
        self._space = ""
        self._has_text = False
        self._is_text_only = False
        self.num_calls = 0

    def add(self, text: str) -> Iterator[str | ParsedCall]:
        """More of the answer; text and calls that are certain now."""
        self._buffer += text
        yield from self._tagged() if self._has_tags else self._bare()

    def finish(self) -> Iterator[str | ParsedCall]:
        """What is left at the answer's end."""
        rest, self._buffer = self._buffer, ""
        inner = rest
        if self._has_tags:
            inner = rest.removeprefix(OPEN_TAG) if rest.startswith(OPEN_TAG) else ""
        call = self._read_call(inner)
        if call is not None:
            yield from self._take(call)
            return
        yield from self._text(rest)
        if self._space and self.num_calls == 0:
            yield self._space
            self._space = ""

    def _bare(self) -> Iterator[str | ParsedCall]:
        """An answer that begins as an object may be a call until its end; any other is text."""
        start = self._buffer.lstrip()
        if not self._is_text_only and (not start or start.startswith("{")):
            return
        self._is_text_only = True
        text, self._buffer = self._buffer, ""
        if text:
            yield text

    def _tagged(self) -> Iterator[str | ParsedCall]:
        while True:
            before, opened, _ = self._buffer.partition(OPEN_TAG)
            if not opened:
                before = self._buffer[: len(self._buffer) - _overlap(self._buffer, OPEN_TAG)]
            self._buffer = self._buffer[len(before) :]
            yield from self._text(before)
            end = self._buffer.find(CLOSE_TAG)
            if not opened or end < 0:
                return
            whole = self._buffer[: end + len(CLOSE_TAG)]
            self._buffer = self._buffer[len(whole) :]
            call = self._read_call(whole[len(OPEN_TAG) : end])
            if call is not None:
                yield from self._take(call)
            else:
                yield from self._text(whole)

    def _text(self, text: str) -> Iterator[str]:
        """Text that is no call; white space waits for what follows it."""
        if not text:
            return
        if not text.strip() and not self._has_text:
            self._space += text
            return
        yield self._space + text
        self._space, self._has_text = "", True

    def _take(self, call: ParsedCall) -> Iterator[ParsedCall]:
        self._space, self._has_text = "", False
        if self._plan.max_calls is None or self.num_calls < self._plan.max_calls:
            self.num_calls += 1
            yield call

    def _read_call(self, text: str) -> ParsedCall | None:
        value = read_json_object(text)
        if value is None or not isinstance(value.get("name"), str):
            return None
        keys = [key for key in _KEYS if key in value]
        if value["name"] not in self._plan.names or len(keys) != 1 or len(value) != 2:
            return None
        arguments: Any = value[keys[0]]
        if not isinstance(arguments, dict):
            return None
        return ParsedCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    return next(
        (num for num in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:num])), 0
    )

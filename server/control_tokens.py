"""Keeps what people type from being read as control tokens.

A chat template writes tokens such as ``<|assistant|>`` to tell who speaks. The same characters in a
message are only text, and must reach the model as text: otherwise anybody whose words end up in a
prompt could put words into everybody's mouth.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import ApiError

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode keeps these for use inside a program; no text that people exchange has them."""


def control_tokens(tokenizer: Any, template_literals: str) -> tuple[str, ...]:
    """Tokens that only the template may write, the longest first.

    These are the tokenizer's special tokens, and the added ones that the template's own text holds
    (``<tool_call>`` where it is not marked as special).
    """
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template_literals and not token.content.isspace())
    }
    return tuple(sorted(tokens - {""}, key=len, reverse=True))


class TextMarks:
    """Marks control tokens in what people typed, so that they are known again in a rendered chat.

    Args:
        tokens: the control tokens, the longest first.
        values: everything that will be marked: strings, lists and dicts of them.
        field: what the request calls them.

    Raises ``ApiError`` if the values hold so many noncharacters that none are left for marks.
    """

    def __init__(self, tokens: tuple[str, ...], values: Any, field: str) -> None:
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        strings = list(_strings(values))
        self.is_needed = any(self._tokens.search(string) for string in strings)
        used = set().union(*map(set, strings)) if self.is_needed else set()
        free = [char for char in _NONCHARACTERS if char not in used]
        if len(free) < 2:
            raise ApiError(
                400,
                f"{field} holds all of the noncharacters U+FDD0 to U+FDEF; two of them are needed",
                param=field,
            )
        self._start, self._end = free[:2]
        # A template may have written its input as JSON in ASCII.
        start, end = (rf"(?:{char}|\\u{ord(char):04x})" for char in (self._start, self._end))
        token = f"({self._tokens.pattern})"
        # One mark is enough: a template may have cut the other one off.
        self._marked = re.compile(f"{start}{token}{end}?|{token}{end}|{start}|{end}")

    def mark(self, value: Any) -> Any:
        """The same value with every control token in it marked; keys of dicts too."""
        if not self.is_needed:
            return value
        if isinstance(value, str):
            return self._tokens.sub(f"{self._start}\\g<0>{self._end}", value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.mark(one) for one in value]
        return value

    def split(self, rendered: str) -> list[str]:
        """Pieces of a rendered chat: ordinary text at even positions, typed tokens at odd ones.

        A mark without a token, as a template cut it, still parts what is around it.
        """
        parts = self._marked.split(rendered)  # text, then two groups of which one may match, ...
        pieces = [parts[0]]
        for idx in range(1, len(parts), 3):
            pieces += [parts[idx] or parts[idx + 1] or "", parts[idx + 2]]
        return pieces


def encode_pieces(
    tokenizer: Any, pieces: list[str], tokens: Iterable[str], field: str
) -> list[int]:
    """Token ids of ``TextMarks.split``'s pieces; no special tokens are added.

    Raises ``ApiError`` for a typed token that the tokenizer only knows as a token.
    """
    ids = _encode(tokenizer, pieces[0])
    forbidden = set(tokenizer.convert_tokens_to_ids(list(tokens))) if len(pieces) > 1 else set()
    for idx, piece in enumerate(pieces[1:], start=1):
        if idx % 2 == 0:
            ids += _encode_inside(tokenizer, piece)
            continue
        # Cut in two it is no token any more.
        text_ids = _encode_inside(tokenizer, piece[:1]) + _encode_inside(tokenizer, piece[1:])
        if not forbidden.isdisjoint(text_ids):
            raise ApiError(
                400,
                f"{field} holds {piece!r}, which this model's tokenizer cannot write as text",
                param=field,
            )
        ids += text_ids
    return ids


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that has other text before it.

    Some tokenizers put a space before whatever they are given: not after a line break, which is
    taken away again.
    """
    if not text:
        return []
    line_break = _encode(tokenizer, "\n")
    ids = _encode(tokenizer, "\n" + text)
    if ids[: len(line_break)] == line_break:
        return ids[len(line_break) :]
    return _encode(tokenizer, text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)

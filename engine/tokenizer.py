"""Text to tokens, and tokens back to text as they come.

Owns: per request, the text decoded so far.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from ..errors import ConfigError

REPLACEMENT = "\ufffd"
"""What decoders put where bytes of a character are missing."""

CONTEXT_TOKENS = 6
"""Prompt tokens decoded with the first new ones, so that spaces between words come out right."""


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or hub id; local files first. Raises ``ConfigError``."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        pass
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ConfigError(
            f"tokenizer is {name!r}; no tokenizer could be loaded from there: {error}"
        ) from error


class Detokenizer:
    """Text of one sequence, extended as tokens arrive.

    A character whose bytes are spread over tokens appears once it is whole; ``finish`` shows what
    is left of it. However the tokens are cut into calls, the text comes out the same. A call that
    raises adds nothing.
    """

    __slots__ = (
        "_prefix",
        "_read",
        "_shown",
        "_skip",
        "_token_ids",
        "_tokenizer",
        "num_tokens",
        "text",
    )

    def __init__(
        self, tokenizer: Any, prompt_token_ids: list[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids = prompt_token_ids[-CONTEXT_TOKENS:]
        # Tokens [_prefix, _read) are in `text` and give context; those from _read on are not yet.
        self._prefix = 0
        self._read = len(self._token_ids)
        self._shown = self._decode(self._prefix, self._read)
        self.text = ""
        self.num_tokens = 0  # generated tokens taken so far

    def append(self, token_id: int) -> None:
        """Add one token; its text appears as soon as it ends on a whole character."""
        self._extend([token_id], is_last=False)

    def finish(self, token_ids: list[int]) -> None:
        """Add the last tokens in one go, and show bytes that never became a whole character."""
        self._extend(token_ids, is_last=True)

    def _extend(self, token_ids: list[int], *, is_last: bool) -> None:
        num_before = len(self._token_ids)
        self._token_ids.extend(token_ids)
        end = len(self._token_ids)
        try:
            text = self._decode(self._prefix, end)
            new = self._new_part(text)
            is_shown = is_last or (bool(new) and not text.endswith(REPLACEMENT))
            shown = self._decode(self._read, end) if is_shown else ""
        except BaseException:
            del self._token_ids[num_before:]
            raise
        self.num_tokens += len(token_ids)
        if is_shown:
            self.text += new
            self._prefix, self._read, self._shown = self._read, end, shown

    def _new_part(self, text: str) -> str:
        """What ``text``, decoded from ``_prefix`` on, has beyond ``_shown``."""
        shown = self._shown
        if not shown.endswith(REPLACEMENT) or text.startswith(shown):
            return text[len(shown) :]
        # A character that was cut at the prompt's end is whole now.
        num_same = 0
        while num_same < len(text) and text[num_same] == shown[num_same]:
            num_same += 1
        return text[num_same:]

    def _decode(self, start: int, end: int) -> str:
        if start == end:
            return ""
        text: str = self._tokenizer.decode(
            self._token_ids[start:end],
            skip_special_tokens=self._skip,
            clean_up_tokenization_spaces=False,
        )
        return text

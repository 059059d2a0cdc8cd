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
    is left of it. However the tokens are cut into calls, the text comes out the same.
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
        self._token_ids.append(token_id)
        self.num_tokens += 1
        text = self._decode(self._prefix, len(self._token_ids))
        if len(text) > len(self._shown) and not text.endswith(REPLACEMENT):
            self._show(text)

    def finish(self, token_ids: list[int]) -> None:
        """Add the last tokens in one go, and show bytes that never became a whole character."""
        self._token_ids.extend(token_ids)
        self.num_tokens += len(token_ids)
        self._show(self._decode(self._prefix, len(self._token_ids)))

    def _show(self, text: str) -> None:
        self.text += text[len(self._shown) :]
        self._prefix, self._read = self._read, len(self._token_ids)
        self._shown = self._decode(self._prefix, self._read)

    def _decode(self, start: int, end: int) -> str:
        if start == end:
            return ""
        text: str = self._tokenizer.decode(
            self._token_ids[start:end],
            skip_special_tokens=self._skip,
            clean_up_tokenization_spaces=False,
        )
        return text

"""Words that a text must not hold, as tokens.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

TokenWords = tuple[tuple[int, ...], ...]


def tokenize_bad_words(words: Sequence[str], tokenizer: Any, vocab_size: int) -> TokenWords:
    """Token ids of each word, as it is at the start of a text and after a space.

    Another way to cut the same word into tokens is not among them. Raises ``ConfigError`` without
    a tokenizer and for a word that it cannot write.
    """
    if tokenizer is None:
        raise ConfigError(f"bad_words is {tuple(words)!r}; it needs a tokenizer")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.strip()
        for text in (bare, f" {bare}"):
            try:
                token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"bad_words holds {word!r}; no tokens for it: {error}") from error
            if not token_ids or max(token_ids) >= vocab_size:
                raise ConfigError(f"bad_words holds {word!r}; the model has no tokens for it")
            found[token_ids] = None
    return tuple(found)


def banned_tokens(words: TokenWords, token_ids: Sequence[int], num_prompt_tokens: int) -> list[int]:
    """Last tokens of the words whose other tokens end the generated ones."""
    banned = []
    for word in words:
        start = len(token_ids) - len(word) + 1
        if start >= num_prompt_tokens and tuple(token_ids[start:]) == word[:-1]:
            banned.append(word[-1])
    return banned

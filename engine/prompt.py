"""Reads prompts in the shapes that callers bring them.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def read_prompt(
    prompt: Any, tokenizer: Any, *, vocab_size: int, max_model_len: int
) -> tuple[str | None, list[int]]:
    """Text, if it came as text, and token ids of a prompt.

    Raises ``ConfigError`` unless there is at least one token, all are in the vocabulary, and the
    context leaves room for one more.
    """
    text = None
    if isinstance(prompt, str):
        text = prompt
        if not prompt:
            raise ConfigError("prompt is empty; it must have at least 1 character")
        if tokenizer is None:
            raise ConfigError("prompt is text and there is no tokenizer; pass prompt_token_ids")
        try:
            token_ids = list(tokenizer.encode(prompt))
        except (TypeError, UnicodeError) as error:  # a lone surrogate is no character
            raise ConfigError(
                f"prompt is {prompt[:80]!r}; it cannot be encoded: {error}"
            ) from error
    elif isinstance(prompt, dict):
        if set(prompt) - {"prompt", "prompt_token_ids"} or "prompt_token_ids" not in prompt:
            raise ConfigError(
                f"prompt has keys {sorted(map(str, prompt))}; supported: prompt_token_ids, and "
                "prompt as the text it stands for"
            )
        text, token_ids = prompt.get("prompt"), prompt["prompt_token_ids"]
        if not isinstance(token_ids, list | tuple):
            raise ConfigError(
                f"prompt_token_ids is a {type(token_ids).__name__}; it must be a list of token ids"
            )
        token_ids = list(token_ids)
    elif isinstance(prompt, list | tuple):
        token_ids = list(prompt)
    else:
        raise ConfigError(
            f"prompt is a {type(prompt).__name__}; it must be a str, a list of token ids or "
            '{"prompt_token_ids": [...]}'
        )
    if not token_ids:
        raise ConfigError("prompt is empty; it must have at least 1 token")
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ConfigError(f"prompt holds {token_id!r}; token ids are integers")
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"prompt holds token id {token_id}; it must be between 0 and {vocab_size - 1}"
            )
    if len(token_ids) >= max_model_len:
        raise ConfigError(
            f"prompt has {len(token_ids)} tokens; at most {max_model_len - 1} leave "
            f"room for an answer in max_model_len, {max_model_len}"
        )
    return text, token_ids

"""Text to tokens and back, and chat templates, away from the threads that must not wait.

Owns: a tokenizer of its own and one thread for it. Tokenizers are not safe to share: the engine's
thread keeps the engine's.
Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..engine import ConfigError
from .vocabulary import Vocabulary

T = TypeVar("T")


class TextProcessor:
    """The tokenizer and chat template of the served model.

    Args:
        tokenizer: a transformers tokenizer, copied; None: the server takes token ids only.
        chat_template: Jinja source that replaces the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._chat_template = chat_template
        if chat_template is None and tokenizer is not None:
            self._chat_template = getattr(tokenizer, "chat_template", None)
        self._vocabulary: Vocabulary | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vmalloc-text")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; call it in ``run`` only. None: there is none."""
        return self._tokenizer

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Jinja source of the chat template (or several by name), None if there is none."""
        return self._chat_template

    async def run(self, function: Callable[[Any], T]) -> T:
        """``function(tokenizer)`` on the tokenizer's thread."""
        if self._tokenizer is None:
            raise ConfigError("the model was loaded without a tokenizer; send token ids")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, self._tokenizer)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises ``ConfigError`` for text that is no Unicode."""
        return (await self.encode_batch([text], add_special_tokens=add_special_tokens))[0]

    async def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text. Raises ``ConfigError`` for text that is no Unicode."""
        for text in texts:
            _check_is_unicode(text)

        def encode(tokenizer: Any) -> list[list[int]]:
            encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
            return [list(token_ids) for token_ids in encoded["input_ids"]]

        return await self.run(encode)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return await self.run(
            lambda tokenizer: str(
                tokenizer.decode(
                    list(token_ids),
                    skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=False,
                )
            )
        )

    async def vocabulary(self) -> Vocabulary:
        """What the tokens stand for; read once."""
        if self._vocabulary is None:
            if self._tokenizer is None:
                self._vocabulary = Vocabulary(None)
            else:
                self._vocabulary = await self.run(Vocabulary)
        return self._vocabulary

    async def max_chars(self, num_tokens: int) -> int | None:
        """More characters than a text of so many tokens can have; None: there may be any number.

        To tokenise megabytes takes many seconds, which all other texts wait for.
        """
        return (await self.vocabulary()).max_chars(num_tokens)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _check_is_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair is no character
        raise ConfigError(
            f"prompt is {text[:80]!r}; character {error.start} is half a surrogate pair"
        ) from error

"""Log-probabilities in the formats of the endpoints.

Owns: per choice of a completion, where its text is.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import Logprob
from .protocol.generation import PromptLogprob
from .vocabulary import Vocabulary

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be: JSON has no infinity."""

Entries = Mapping[int, Logprob]


@dataclass(frozen=True, slots=True)
class LogprobFormat:
    """How log-probabilities of one request are written.

    Attributes:
        vocabulary: what tokens stand for.
        num_top: likeliest tokens to list.
        as_token_ids: write tokens as ``token_id:N``.
        skips_special: special tokens are not part of the text.
    """

    vocabulary: Vocabulary
    num_top: int
    as_token_ids: bool = False
    skips_special: bool = True

    def token(self, token_id: int) -> str:
        """How a token is written."""
        return f"token_id:{token_id}" if self.as_token_ids else self.vocabulary.token_text(token_id)

    def top(self, entries: Entries) -> list[tuple[int, Logprob]]:
        """The ``num_top`` likeliest tokens, the likeliest first."""
        return sorted(entries.items(), key=lambda item: item[1].rank)[: self.num_top]


class CompletionLogprobsWriter:
    """The ``logprobs`` of one choice of ``/v1/completions``, whole or in chunks.

    Offsets go on over chunks. The tokens of one character that is spread over several have the
    same one.
    """

    def __init__(self, form: LogprobFormat) -> None:
        self._form = form
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._offsets: list[int] = []
        self._logprobs: list[float | None] = []
        self._tokens: list[str] = []
        self._tops: list[dict[str, float] | None] = []

    def add_prompt(
        self, text: str, token_ids: Sequence[int], entries: Sequence[Entries | None]
    ) -> None:
        """Write an echoed prompt; ``text`` may lack special tokens, and be cut differently."""
        for token_id, place in zip(token_ids, entries, strict=True):
            self._write(token_id, place)
            chars = self._decoder.decode(self._form.vocabulary.token_bytes(token_id))
            if text.startswith(chars, self._offset):
                self._offset += len(chars)
            elif text.startswith(chars.lstrip(" "), self._offset):  # the space before a text
                self._offset += len(chars.lstrip(" "))
            elif not self._form.vocabulary.is_special(token_id):
                self._offset = min(self._offset + len(chars), len(text))
        self._offset = len(text)
        self._decoder.reset()

    def add(self, token_ids: Sequence[int], entries: Sequence[Entries]) -> None:
        """Write generated tokens."""
        vocabulary = self._form.vocabulary
        for token_id, place in zip(token_ids, entries, strict=True):
            self._write(token_id, place)
            if not (self._form.skips_special and vocabulary.is_special(token_id)):
                self._offset += len(self._decoder.decode(vocabulary.token_bytes(token_id)))

    def take(self) -> dict[str, Any]:
        """What was written since the last call, as ``CompletionLogprobs``."""
        chunk = {
            "text_offset": self._offsets,
            "token_logprobs": self._logprobs,
            "tokens": self._tokens,
            "top_logprobs": self._tops,
        }
        self._start_chunk()
        return chunk

    def _write(self, token_id: int, entries: Entries | None) -> None:
        form = self._form
        name = form.token(token_id)
        self._offsets.append(self._offset)
        self._tokens.append(name)
        if entries is None:
            self._logprobs.append(None)
            self._tops.append(None)
            return
        logprob = _finite(entries[token_id].logprob)
        top: dict[str, float] = {}
        for other_id, other in form.top(entries):
            # Two tokens may be written alike; the likelier one counts.
            top.setdefault(form.token(other_id), _finite(other.logprob))
        top.setdefault(name, logprob)
        self._logprobs.append(logprob)
        self._tops.append(top)


def chat_logprobs(
    form: LogprobFormat, token_ids: Sequence[int], entries: Sequence[Entries]
) -> list[dict[str, Any]]:
    """A ``TokenLogprob`` for each token of an answer, as chats and responses have them."""
    return [
        {
            **_chat_entry(form, token_id, place[token_id]),
            "top_logprobs": [_chat_entry(form, *item) for item in form.top(place)],
        }
        for token_id, place in zip(token_ids, entries, strict=True)
    ]


def prompt_logprobs(
    form: LogprobFormat, entries: Sequence[Entries | None]
) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's ``prompt_logprobs``: per token of a prompt, candidates by token id."""
    return [None if place is None else _prompt_place(form, place) for place in entries]


def _prompt_place(form: LogprobFormat, place: Entries) -> dict[str, PromptLogprob]:
    token_id = next(iter(place))  # the prompt's own token comes first
    wanted = {token_id: place[token_id], **dict(form.top(place))}
    return {
        str(other_id): PromptLogprob(
            logprob=_finite(entry.logprob), rank=entry.rank, decoded_token=form.token(other_id)
        )
        for other_id, entry in wanted.items()
    }


def _chat_entry(form: LogprobFormat, token_id: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token": form.token(token_id),
        "logprob": _finite(entry.logprob),
        "bytes": list(form.vocabulary.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)

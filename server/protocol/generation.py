"""Parts that the responses of all generating endpoints are made of.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Literal

from .base import ApiResponse

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(ApiResponse):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class Usage(ApiResponse):
    """Tokens of a request. A prompt counts once, whatever ``n`` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(ApiResponse):
    """Log-probabilities as ``/v1/completions`` has them: one entry a token in each list.

    Attributes:
        text_offset: where the token starts in the choice's text, in characters.
        token_logprobs: of the token; None for a prompt's first one.
        tokens: how the token is written.
        top_logprobs: of the likeliest tokens and of this one; None for a prompt's first one.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TopLogprob(ApiResponse):
    """A likely token. ``bytes``: its part of the text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class PromptLogprob(ApiResponse):
    """vLLM's log-probability of one token at one place of a prompt."""

    logprob: float
    rank: int
    decoded_token: str | None

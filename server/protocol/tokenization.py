"""Bodies of ``/tokenize`` and ``/detokenize``; shapes are vLLM's.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from pydantic import Field

from .base import ApiRequest, ApiResponse
from .values import TokenIdList


class TokenizeRequest(ApiRequest):
    """A text to cut into tokens."""

    model: str | None = Field(None, description="name of the model; null: the served one")
    prompt: str = Field(description="the text")
    add_special_tokens: bool | None = Field(
        True, description="let the tokenizer add what it puts around a text"
    )
    return_token_strs: bool | None = Field(False, description="return the tokens' pieces too")


class TokenizeResponse(ApiResponse):
    """The tokens of a text, and how many the model takes in all."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(ApiRequest):
    """Tokens to put together."""

    model: str | None = Field(None, description="name of the model; null: the served one")
    tokens: TokenIdList = Field(description="token ids")


class DetokenizeResponse(ApiResponse):
    """The text of tokens, special ones included."""

    prompt: str

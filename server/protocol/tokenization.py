"""Bodies of ``/tokenize`` and ``/detokenize``; shapes are vLLM's.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import ApiRequest, ApiResponse, unsupported
from .json_value import JsonObject
from .messages import ChatMessage
from .tools import Tool
from .values import TokenIdList

_Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
_Tools = Annotated[list[Tool], Field(fail_fast=True)]


class TokenizeRequest(ApiRequest):
    """A text, or a chat, to cut into tokens."""

    model: str | None = Field(None, description="name of the model; null: the served one")
    prompt: str | None = Field(None, description="the text")
    add_special_tokens: bool | None = Field(
        None,
        description="let the tokenizer add what it puts around a text; true by default, and only "
        "with `prompt`: a chat template writes its own",
    )
    return_token_strs: bool | None = Field(False, description="return the tokens' pieces too")

    messages: _Messages | None = Field(None, description="the chat; this or `prompt`")
    tools: _Tools | None = Field(None, description="functions that the model may call")
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt where an answer begins; true by default"
    )
    continue_final_message: bool | None = Field(False, description="go on with the last message")
    chat_template_kwargs: JsonObject | None = Field(
        None, description="further variables of the chat template"
    )
    chat_template: unsupported(  # type: ignore[valid-type]
        "a template is a program; start the server with --chat-template"
    ) = None


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

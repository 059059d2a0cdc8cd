"""What ``/v1/chat/completions`` answers.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Literal

from .base import ApiResponse
from .generation import PromptLogprob, TokenLogprob, Usage
from .tools import ToolCall

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatLogprobs(ApiResponse):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(ApiResponse):
    """An answer. Its ``content`` is null where it is nothing but calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ApiResponse):
    """One of the ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(ApiResponse):
    """All answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None

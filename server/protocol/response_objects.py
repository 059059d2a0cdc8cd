"""What ``/v1/responses`` answers.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Any, Literal

from .base import ApiResponse
from .generation import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(ApiResponse):
    """A text. ``logprobs`` only where they were asked for."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob] | None = None


class OutputMessage(ApiResponse):
    """A message of the model's."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputCall(ApiResponse):
    """A call of a function; ``arguments`` is a JSON object as text."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class IncompleteDetails(ApiResponse):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseError(ApiResponse):
    """Why there is no whole answer."""

    code: str
    message: str


class InputTokensDetails(ApiResponse):
    """Where the tokens of a prompt came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ApiResponse):
    """What the tokens of an answer were for. Thinking is not told apart."""

    reasoning_tokens: int


class ResponseUsage(ApiResponse):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(ApiResponse):
    """An answer, with the settings that it was made by."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    background: Literal[False]
    store: Literal[False]
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    metadata: dict[str, str]
    reasoning: dict[str, Any]
    service_tier: Literal["default"]

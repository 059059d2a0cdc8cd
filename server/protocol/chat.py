"""Body of ``/v1/chat/completions``.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import accepted, unsupported
from .json_value import JsonObject
from .messages import ChatMessage
from .sampling import SamplingFields
from .tools import Tool, ToolChoice

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_NO_AUDIO = "answers are text"


class ChatRequest(SamplingFields):
    """A chat to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most tokens to generate; null: as many as the context holds"
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="`max_completion_tokens` by its old name"
    )
    logprobs: bool | None = Field(False, description="log-probabilities of the answer's tokens")
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="likeliest tokens at each place; only with `logprobs`"
    )

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        None, description="functions that the model may call"
    )
    tool_choice: ToolChoice = Field(
        None, description="whether tools are called; `auto` where there are some"
    )
    parallel_tool_calls: bool | None = Field(True, description="an answer may have several calls")

    add_generation_prompt: bool | None = Field(
        None, description="end the prompt where an answer begins; vLLM's, true by default"
    )
    continue_final_message: bool | None = Field(
        False, description="go on with the last message; vLLM's"
    )
    echo: bool | None = Field(
        False, description="begin the answer with the last message, an assistant's; vLLM's"
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="further variables of the chat template; vLLM's"
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="for chat templates with a variable of that name; else only `none`"
    )

    prediction: JsonObject | None = accepted(description="it would only make the answer faster")
    prompt_cache_options: JsonObject | None = accepted(
        description="cached prompts stay as long as there is room"
    )

    modalities: unsupported(_NO_AUDIO, ["text"]) = None  # type: ignore[valid-type]
    audio: unsupported(_NO_AUDIO) = None  # type: ignore[valid-type]
    verbosity: unsupported(  # type: ignore[valid-type]
        "answers are as long as the model makes them", "medium"
    ) = None
    functions: unsupported("use tools", []) = None  # type: ignore[valid-type]
    function_call: unsupported("use tool_choice", "none") = None  # type: ignore[valid-type]
    web_search_options: unsupported("there is no search") = None  # type: ignore[valid-type]
    moderation: unsupported("nothing is moderated") = None  # type: ignore[valid-type]
    chat_template: unsupported(  # type: ignore[valid-type]
        "a template is a program; start the server with --chat-template"
    ) = None
    add_special_tokens: unsupported(  # type: ignore[valid-type]
        "the chat template writes them", False
    ) = None
    documents: unsupported("put them into messages") = None  # type: ignore[valid-type]
    include_reasoning: unsupported(  # type: ignore[valid-type]
        "thinking is not told apart from the answer", True
    ) = None
    mm_processor_kwargs: unsupported("messages are text") = None  # type: ignore[valid-type]

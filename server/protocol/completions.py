"""Bodies of ``/v1/completions``.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import ApiResponse, unsupported
from .generation import CompletionLogprobs, FinishReason, PromptLogprob, Usage
from .sampling import SamplingFields
from .values import Prompts

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(SamplingFields):
    """Prompts to go on from."""

    prompt: Prompts = Field(
        description="a text, a list of up to 1,024 texts, token ids, or a list of lists of these"
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        DEFAULT_MAX_TOKENS,
        description="most tokens of a completion; null: 16, or what the context leaves; 0 only "
        "with `echo`",
    )
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="log-probabilities of so many likeliest tokens and of the chosen one; up to "
        "`--max-logprobs`, 20",
    )
    echo: bool | None = Field(False, description="start the text with the prompt")
    add_special_tokens: bool | None = Field(
        True, description="let the tokenizer add what it puts around a text"
    )
    suffix: unsupported(  # type: ignore[valid-type]
        "text is only ever added at the end", ""
    ) = None
    prompt_embeds: unsupported("send text or token ids") = None  # type: ignore[valid-type]


class CompletionChoice(ApiResponse):
    """One completion of one prompt: the choice ``index`` is ``prompt index * n + number``.

    Attributes:
        stop_reason: the stop string or token that ended it.
        token_ids, prompt_token_ids: only with ``return_token_ids``.
        prompt_logprobs: only with ``prompt_logprobs``.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(ApiResponse):
    """All completions of a request; also a chunk of its stream, with what is new of one of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None

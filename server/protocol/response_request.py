"""Body of ``/v1/responses``.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from .base import ApiRequest, accepted, unsupported
from .chat import ReasoningEffort
from .json_value import JsonObject
from .messages import content_schema, read_content
from .tools import FlatToolChoice, FunctionDefinition, ToolName
from .values import StopStrings

_PART_TYPES = ("input_text", "output_text", "text")
_OUTPUT_PARTS = frozenset({"annotations", "logprobs"})
"""What the parts of an earlier answer have besides their text."""

_Text = Annotated[str, Field(min_length=1)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]

InputContent = Annotated[
    str | None,
    PlainValidator(lambda value: read_content(value, _PART_TYPES, _OUTPUT_PARTS)),
    content_schema(*_PART_TYPES, annotations={"type": "array"}, logprobs={}),
]


class InputItem(ApiRequest):
    """A message, a call that the model made, or what a tool answered.

    What the fields of a type may be is checked where it becomes a message.
    """

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: InputContent = Field(None, description="text, or a list of text parts")
    call_id: _Name | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    arguments: str | None = None
    output: InputContent = None
    id: _Name | None = accepted(description="items are in their order")
    status: Literal["in_progress", "completed", "incomplete"] | None = accepted(
        description="items are taken as they are"
    )
    phase: Literal["commentary", "final_answer"] | None = accepted(
        description="earlier answers are all alike"
    )


class TextFormat(ApiRequest):
    """The form of an answer; OpenAI's."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="any text, any JSON object, or what `schema` describes"
    )
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = accepted(
        description="what the schema is called"
    )
    schema_: JsonObject | None = Field(None, alias="schema", description="a JSON schema")
    description: str | None = accepted(description="what the schema is for")
    strict: bool | None = accepted(description="every schema is enforced")


class TextConfig(ApiRequest):
    """How the answer's text is to be."""

    format: TextFormat | None = Field(None, description="form of the text; null: any")
    verbosity: unsupported(  # type: ignore[valid-type]
        "answers are as long as the model makes them", "medium"
    ) = None


class FunctionTool(ApiRequest):
    """A function of the client's."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(
        None, description="JSON schema of the arguments; null: there are none"
    )
    strict: bool | None = Field(
        None, description="arguments always follow the schema, also where the model may choose"
    )

    @property
    def function(self) -> FunctionDefinition:
        """As chats have it."""
        return FunctionDefinition.model_construct(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )


class Reasoning(ApiRequest):
    """How much the model thinks."""

    effort: ReasoningEffort | None = Field(
        None, description="for chat templates with a variable reasoning_effort; else only `none`"
    )
    summary: Literal["auto", "concise", "detailed"] | None = accepted(
        description="thinking is not told apart from the answer"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = accepted(
        description="`summary` by its old name"
    )


class ResponseStreamOptions(ApiRequest):
    """What a stream tells besides its events."""

    include_obfuscation: unsupported(  # type: ignore[valid-type]
        "events are not padded", False
    ) = None


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _or_string(schema: dict[str, Any]) -> None:
    items = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, items]


_STATELESS = "nothing is stored; send the whole conversation as input"


class ResponseRequest(ApiRequest):
    """A conversation to go on with."""

    model: str | None = Field(None, description="name of the model; null: the served one")
    input: Annotated[
        list[InputItem],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_as_items),
    ] = Field(description="text, or what was said so far", json_schema_extra=_or_string)
    instructions: str | None = Field(None, description="a system message before the input")

    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most tokens to generate; null: as many as the context holds"
    )
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        1.0, description="0 takes the most likely token"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        1.0, description="sample among the fewest tokens whose probabilities reach this sum"
    )
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="likeliest tokens at each place; only where `include` has "
        "`message.output_text.logprobs`",
    )
    include: (
        Annotated[
            list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
            Field(fail_fast=True, max_length=16),
        ]
        | None
    ) = Field(
        None,
        description="`message.output_text.logprobs`; `reasoning.encrypted_content` is accepted: no "
        "answer has any",
    )
    text: TextConfig | None = Field(None, description="form of the text")

    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = Field(
        None, description="functions that the model may call"
    )
    tool_choice: FlatToolChoice = Field(
        None, description="whether tools are called; `auto` where there are some"
    )
    parallel_tool_calls: bool | None = Field(True, description="an answer may have several calls")
    reasoning: Reasoning | None = None

    stream: bool | None = Field(False, description="send events as things happen")
    stream_options: ResponseStreamOptions | None = Field(None, description="only with `stream`")

    # vLLM's additions.
    top_k: Annotated[int, Field(ge=-1)] | None = Field(
        0, description="sample among the k most likely tokens; 0 or -1: all"
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = Field(
        None, description="same request and seed, same answer"
    )
    stop: StopStrings = Field(None, description="strings that end the text before them")
    ignore_eos: bool | None = Field(False, description="go on past the model's end token")
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(
        0, description="lower runs first; other than 0 needs `--scheduling-policy priority`"
    )
    cache_salt: _Text | None = Field(
        None, description="the prompt shares cached KV only with prompts of the same salt"
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="further variables of the chat template"
    )

    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = accepted(description="sent back in the answer")
    store: Literal[False] | None = accepted(
        description="nothing is ever stored, also where it is omitted"
    )
    user: Annotated[str, Field(max_length=1024)] | None = accepted(description="not looked at")
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = accepted(
        description="not looked at"
    )
    service_tier: Annotated[str, Field(max_length=1024)] | None = accepted(
        description="there is one tier"
    )
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = accepted(
        description="equal prompts are found without it"
    )
    prompt_cache_retention: Annotated[str, Field(max_length=1024)] | None = accepted(
        description="cached prompts stay as long as there is room"
    )
    prompt_cache_options: JsonObject | None = accepted(
        description="cached prompts stay as long as there is room"
    )
    max_tool_calls: Annotated[int, Field(ge=1)] | None = accepted(
        description="limits tools that a server runs itself; there are none"
    )

    previous_response_id: unsupported(_STATELESS) = None  # type: ignore[valid-type]
    conversation: unsupported(_STATELESS) = None  # type: ignore[valid-type]
    background: unsupported(_STATELESS, False) = None  # type: ignore[valid-type]
    background_options: unsupported(_STATELESS) = None  # type: ignore[valid-type]
    prompt: unsupported("there are no stored prompts") = None  # type: ignore[valid-type]
    truncation: unsupported(  # type: ignore[valid-type]
        "input that is too long is refused, never cut", "disabled"
    ) = None
    context_management: unsupported(  # type: ignore[valid-type]
        "input that is too long is refused, never cut", []
    ) = None
    moderation: unsupported("nothing is moderated") = None  # type: ignore[valid-type]
    image: unsupported("input is text") = None  # type: ignore[valid-type]
    access_programs: unsupported("there are none") = None  # type: ignore[valid-type]

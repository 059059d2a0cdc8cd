"""From the body of ``/v1/responses`` to the task that chats have too.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from .chat_plan import ChatTask
from .errors import invalid_field
from .protocol.json_value import read_json_object
from .protocol.messages import ChatMessage
from .protocol.response_request import InputItem, ResponseRequest, TextFormat
from .protocol.sampling import SamplingFields
from .protocol.structured import JsonSchemaFormat, ResponseFormat
from .protocol.tools import SentFunctionCall, SentToolCall

LOGPROBS = "message.output_text.logprobs"

_FIELDS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "ignore_eos",
    "priority",
    "cache_salt",
    "stream",
)


def response_task(body: ResponseRequest) -> ChatTask:
    """What is to be said. Raises ``ApiError`` for items that cannot be."""
    if body.stream_options is not None and not body.stream:
        raise invalid_field("stream_options", "is set without stream")
    has_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs is not None and not has_logprobs:
        raise invalid_field(
            "top_logprobs", f"is {body.top_logprobs}; it needs {LOGPROBS} in include"
        )
    messages, places = _messages(body)
    return ChatTask(
        fields=_fields(body),
        messages=messages,
        places=places,
        field="input",
        functions=None if body.tools is None else [tool.function for tool in body.tools],
        function_place="",
        tool_choice=body.tool_choice,
        has_parallel_calls=body.parallel_tool_calls is not False,
        max_tokens=body.max_output_tokens,
        max_tokens_name="max_output_tokens",
        num_logprobs=(body.top_logprobs or 0) if has_logprobs else None,
        template_kwargs=body.chat_template_kwargs,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        reasoning_effort_name="reasoning.effort",
        form_name="text.format",
    )


def _fields(body: ResponseRequest) -> SamplingFields:
    fields = SamplingFields.model_construct(**{name: getattr(body, name) for name in _FIELDS})
    fields.response_format = None if body.text is None else _form(body.text.format)
    return fields


def _form(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    if (given.schema_ is not None) != (given.type == "json_schema"):
        what = "is missing" if given.schema_ is None else "is set"
        raise invalid_field("text.format.schema", f"{what} with the type {given.type}")
    schema = None
    if given.schema_ is not None:
        schema = JsonSchemaFormat.model_construct(name=given.name or "", schema_=given.schema_)
    return ResponseFormat.model_construct(type=given.type, json_schema=schema)


def _messages(body: ResponseRequest) -> tuple[list[ChatMessage], list[str]]:
    """Messages, and what each is called in the request. Calls that follow each other, or a message
    of the model's, are one message of it."""
    messages: list[ChatMessage] = []
    places: list[str] = []
    if body.instructions is not None:
        messages.append(ChatMessage.model_construct(role="system", content=body.instructions))
        places.append("instructions")
    for idx, item in enumerate(body.input):
        place = f"input.{idx}"
        message = _message(item, place)
        last = messages[-1] if messages else None
        if message.tool_calls and last is not None and last.role == "assistant":
            last.tool_calls = [*(last.tool_calls or ()), *message.tool_calls]
            continue
        messages.append(message)
        places.append(place)
    return messages, places


def _message(item: InputItem, place: str) -> ChatMessage:
    if item.type == "message":
        _check_fields(item, place, "role", "content")
        return ChatMessage.model_construct(role=item.role, content=item.content)
    if item.type == "function_call_output":
        _check_fields(item, place, "call_id", "output")
        return ChatMessage.model_construct(
            role="tool", content=item.output, tool_call_id=item.call_id
        )
    _check_fields(item, place, "call_id", "name", "arguments")
    assert item.arguments is not None
    if read_json_object(item.arguments) is None:
        raise invalid_field(
            f"{place}.arguments", f"is {item.arguments!r:.100}; it must be a JSON object as text"
        )
    function = SentFunctionCall.model_construct(name=item.name, arguments=item.arguments)
    call = SentToolCall.model_construct(id=item.call_id, function=function)
    return ChatMessage.model_construct(role="assistant", content=None, tool_calls=[call])


def _check_fields(item: InputItem, place: str, *wanted: str) -> None:
    """Raise ``ApiError`` unless exactly these fields are set."""
    for name in ("role", "content", "call_id", "name", "arguments", "output"):
        if (getattr(item, name) is not None) != (name in wanted):
            what = "is missing" if name in wanted else "is set"
            raise invalid_field(f"{place}.{name}", f"{what} in an item of type {item.type}")

"""What chats and responses have in common: from messages and fields to the engine's request.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import EngineRequest
from .chat_messages import template_messages
from .chat_template import RenderedPrompt, render_chat, template_of
from .errors import ApiError
from .logprobs import LogprobFormat
from .protocol.messages import ChatMessage
from .protocol.sampling import SamplingFields
from .protocol.tools import FunctionDefinition, NamedTool
from .sampling import check_room, form_names, sampling_params, value
from .state import ServerState
from .tools import ToolPlan, plan_tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTask:
    """What is to be said, whichever endpoint it came through.

    Attributes:
        fields: how tokens are chosen.
        messages: the chat.
        places: what each message is called in the request.
        field: what the request calls all messages.
        functions, tool_choice, has_parallel_calls, function_place: tools; see ``plan_tools``.
        max_tokens: most tokens to generate; None: as many as the context holds.
        max_tokens_name: the field that it came from.
        num_logprobs: likeliest tokens to report at each place; None: no log-probabilities.
        num_logprobs_name: the field that it came from.
        add_generation_prompt, continue_final_message, template_kwargs: see ``render_chat``.
        reasoning_effort: a variable of some templates.
        reasoning_effort_name: the field that it came from.
        form_name: the field that ``fields.response_format`` came from.
    """

    fields: SamplingFields
    messages: Sequence[ChatMessage]
    places: Sequence[str]
    field: str = "messages"
    functions: Sequence[FunctionDefinition] | None = None
    tool_choice: NamedTool | str | None = None
    has_parallel_calls: bool = True
    function_place: str = "function."
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    num_logprobs: int | None = None
    num_logprobs_name: str = "top_logprobs"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning_effort_name: str = "reasoning_effort"
    form_name: str = "response_format"


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat that is ready for the engine.

    Attributes:
        prompt: what the model reads.
        request: what the engine gets.
        tools: how tools take part; None: they do not.
        logprobs: how log-probabilities are written; None: nobody asked for any.
        field_names: what the request calls settings of the engine that have other names there.
    """

    prompt: RenderedPrompt
    request: EngineRequest
    tools: ToolPlan | None
    logprobs: LogprobFormat | None
    field_names: Mapping[str, str]


async def plan_chat(state: ServerState, task: ChatTask) -> ChatPlan:
    """Check a task, render its prompt, and make the engine's request. Raises ``ApiError`` and
    ``ConfigError``."""
    prompt, tools = await render_task(state, task)
    if tools is not None:
        _check_no_form(task)
    _check_num_logprobs(state, task)
    params = sampling_params(
        task.fields,
        max_tokens=task.max_tokens,
        logprobs=task.num_logprobs,
        structured_outputs=None if tools is None else tools.form,
    )
    _check_length(state, task, prompt)
    return ChatPlan(
        prompt=prompt,
        request=EngineRequest(
            {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids},
            params,
            value(task.fields, "priority"),
        ),
        tools=tools,
        logprobs=await _logprob_format(state, task),
        field_names=_field_names(task, tools),
    )


async def render_task(state: ServerState, task: ChatTask) -> tuple[RenderedPrompt, ToolPlan | None]:
    """A task's prompt, and how tools take part. Raises ``ApiError``."""
    with_tools = bool(task.functions) and task.tool_choice != "none"
    template = template_of(state, with_tools=with_tools)
    tools = plan_tools(
        task.functions,
        task.tool_choice,
        template,
        has_parallel_calls=task.has_parallel_calls,
        function_place=task.function_place,
    )
    prompt = await render_chat(
        state,
        template_messages(task.messages, task.places, template),
        tools=None if tools is None else tools.definitions,
        add_generation_prompt=task.add_generation_prompt,
        continue_final_message=task.continue_final_message,
        template=template,
        template_kwargs=_variables(task, template.variables),
        field=task.field,
    )
    return prompt, tools


def adds_generation_prompt(given: bool | None, continue_final_message: bool) -> bool:
    """A request's ``add_generation_prompt``: by default unless the last message is gone on with."""
    return not continue_final_message if given is None else given


def _check_no_form(task: ChatTask) -> None:
    response_format = task.fields.response_format
    if response_format is not None and response_format.type != "text":
        raise ApiError(
            400,
            f"{task.form_name} is set beside tools; an answer has that form, or calls tools. With "
            "tool_choice none it is honoured",
            param=task.form_name,
            code="unsupported_parameter",
        )


def _check_num_logprobs(state: ServerState, task: ChatTask) -> None:
    config = state.engine.config
    if config is None or task.num_logprobs is None or task.num_logprobs <= config.max_logprobs:
        return
    name = task.num_logprobs_name
    raise ApiError(
        400,
        f"{name} is {task.num_logprobs}; it must not exceed max_logprobs, {config.max_logprobs}",
        param=name,
        code="invalid_value",
    )


def _check_length(state: ServerState, task: ChatTask, prompt: RenderedPrompt) -> None:
    assert state.max_model_len is not None
    check_room(
        task.max_tokens,
        len(prompt.token_ids),
        state.max_model_len,
        name=task.max_tokens_name,
        prompt_name=task.field,
    )


def _variables(task: ChatTask, known: frozenset[str]) -> dict[str, Any]:
    """The template's further variables. Raises ``ApiError`` for an effort that it would ignore."""
    variables = dict(task.template_kwargs or {})
    effort = task.reasoning_effort
    if effort is not None and "reasoning_effort" in known:
        variables.setdefault("reasoning_effort", effort)
    elif effort not in (None, "none"):
        name = task.reasoning_effort_name
        raise ApiError(
            400,
            f"{name} is {effort!r}; the model's chat template knows none",
            param=name,
            code="unsupported_parameter",
        )
    return variables


async def _logprob_format(state: ServerState, task: ChatTask) -> LogprobFormat | None:
    if task.num_logprobs is None and task.fields.prompt_logprobs is None:
        return None
    return LogprobFormat(
        vocabulary=await state.text.vocabulary(),
        num_top=task.num_logprobs or 0,
        as_token_ids=bool(task.fields.return_tokens_as_token_ids),
        skips_special=value(task.fields, "skip_special_tokens"),
    )


def _field_names(task: ChatTask, tools: ToolPlan | None) -> dict[str, str]:
    names = {"prompt": task.field, "max_tokens": task.max_tokens_name}
    fields = task.fields
    if tools is not None and tools.form is not None:
        names["grammar"] = "tools"
    elif fields.response_format is not None:
        names["json"] = task.form_name
    else:
        names |= form_names(fields)
    return names

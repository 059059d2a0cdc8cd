"""``/v1/chat/completions``: an assistant answers.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from .chat_answer import AnswerPlan, ChatEncoder, whole_answer
from .chat_plan import ChatTask, adds_generation_prompt, plan_chat
from .errors import invalid_field
from .fingerprint import system_fingerprint
from .generation import EventStream, generate, new_id, server_state
from .json_body import JsonRoute
from .model_routes import check_model
from .protocol.chat import ChatRequest
from .protocol.chat_answers import ChatCompletion
from .responses import GENERATION_ERRORS

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**GENERATION_ERRORS})
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Go on with a chat; with `stream` as server-sent events."""
    state = server_state(request)
    check_model(state, body.model)
    chat = await plan_chat(state, _task(body))
    plan = AnswerPlan(
        body=body,
        head={
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": body.model or state.model_name,
            "system_fingerprint": system_fingerprint(state),
        },
        chat=chat,
        echo=_echo(body),
    )
    request_id = plan.head["id"]
    if body.stream:
        encoder = ChatEncoder(plan)
        return EventStream(request, request_id, [chat.request], encoder, chat.field_names)
    outputs = await generate(request, request_id, [chat.request], chat.field_names)
    answer = whole_answer(plan, outputs[0])
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


def _task(body: ChatRequest) -> ChatTask:
    max_tokens, max_tokens_name = _max_tokens(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid_field("top_logprobs", f"is {body.top_logprobs} without logprobs")
    if body.continue_final_message and body.messages[-1].role != "assistant":
        raise invalid_field(
            "continue_final_message",
            f"is true; the last message is the {body.messages[-1].role}'s, not the assistant's",
        )
    return ChatTask(
        fields=body,
        messages=body.messages,
        places=[f"messages.{idx}" for idx in range(len(body.messages))],
        functions=None if body.tools is None else [tool.function for tool in body.tools],
        tool_choice=body.tool_choice,
        has_parallel_calls=body.parallel_tool_calls is not False,
        max_tokens=max_tokens,
        max_tokens_name=max_tokens_name,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        add_generation_prompt=adds_generation_prompt(
            body.add_generation_prompt, bool(body.continue_final_message)
        ),
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
    )


def _max_tokens(body: ChatRequest) -> tuple[int | None, str]:
    """The limit, and the name that it was given by."""
    if body.max_completion_tokens is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise invalid_field(
            "max_tokens",
            f"is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; they "
            "mean the same",
        )
    return body.max_completion_tokens, "max_completion_tokens"


def _echo(body: ChatRequest) -> str:
    if not body.echo:
        return ""
    last = body.messages[-1]
    if last.role != "assistant":
        raise invalid_field(
            "echo", f"is true; the last message is the {last.role}'s, not the assistant's"
        )
    return last.content or ""

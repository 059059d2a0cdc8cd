"""``/v1/responses``: OpenAI's other way to ask for an answer. Nothing is stored.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import time
from typing import NoReturn

from fastapi import APIRouter, Request
from starlette.responses import Response

from .chat_plan import plan_chat
from .errors import ApiError
from .generation import EventStream, generate, server_state
from .json_body import JsonRoute
from .model_routes import check_model
from .protocol.response_objects import ResponseObject
from .protocol.response_request import ResponseRequest
from .response_answer import ResponseEncoder, ResponsePlan, response_id, whole_response
from .response_input import response_task
from .responses import GENERATION_ERRORS, errors

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/responses", response_model=ResponseObject, responses={**GENERATION_ERRORS})
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Go on with a conversation; with `stream` as server-sent events.

    Nothing is stored: `store` is false where it is omitted, and true is refused.
    """
    state = server_state(request)
    check_model(state, body.model)
    chat = await plan_chat(state, response_task(body))
    plan = ResponsePlan(
        body=body,
        id=response_id("resp"),
        model=body.model or state.model_name,
        created_at=int(time.time()),
        chat=chat,
    )
    if body.stream:
        encoder = ResponseEncoder(plan)
        return EventStream(request, plan.id, [chat.request], encoder, chat.field_names)
    outputs = await generate(request, plan.id, [chat.request], chat.field_names)
    answer = whole_response(plan, outputs[0])
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


# What a client may ask about a response afterwards, were it stored.
@router.get("/v1/responses/{response_id}", responses={**errors(401, 404)}, status_code=404)
async def retrieve_response(response_id: str) -> None:
    """Responses are not stored: there is none of that id."""
    _refuse(response_id)


@router.delete("/v1/responses/{response_id}", responses={**errors(401, 404)}, status_code=404)
async def delete_response(response_id: str) -> None:
    """Responses are not stored: there is none of that id."""
    _refuse(response_id)


@router.post("/v1/responses/{response_id}/cancel", responses={**errors(401, 404)}, status_code=404)
async def cancel_response(response_id: str) -> None:
    """Only responses in the background can be cancelled, and there are none; see `/abort`."""
    _refuse(response_id)


@router.get(
    "/v1/responses/{response_id}/input_items", responses={**errors(401, 404)}, status_code=404
)
async def list_input_items(response_id: str) -> None:
    """Responses are not stored: there is none of that id."""
    _refuse(response_id)


def _refuse(name: str) -> NoReturn:
    raise ApiError(
        404,
        f"response_id is {name!r:.200}; responses are not stored",
        param="response_id",
        code="response_not_found",
    )

"""``/tokenize`` and ``/detokenize``.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from .chat_plan import ChatTask, adds_generation_prompt, render_task
from .errors import ApiError, invalid_field
from .generation import server_state
from .json_body import JsonRoute
from .model_routes import check_model
from .protocol.sampling import SamplingFields
from .protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from .responses import TEXT_ERRORS
from .state import ServerState

_CHAT_FIELDS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")

router = APIRouter(route_class=JsonRoute, tags=["tokens"], responses={**TEXT_ERRORS})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """The token ids of a text, as `/v1/completions` would see them, or of a chat, as
    `/v1/chat/completions` would."""
    state = server_state(request)
    check_model(state, body.model)
    token_ids = await _token_ids(state, body)
    pieces = None
    if body.return_token_strs:
        pieces = await state.text.run(lambda tokenizer: tokenizer.convert_ids_to_tokens(token_ids))
    assert state.max_model_len is not None
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=state.max_model_len,
        tokens=token_ids,
        token_strs=pieces,
    )


async def _token_ids(state: ServerState, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        if body.prompt is None:
            raise ApiError(
                400,
                "prompt is missing, and so is messages",
                param="prompt",
                code="missing_required_parameter",
            )
        for name in _CHAT_FIELDS:
            if getattr(body, name):
                raise invalid_field(name, "is set without messages")
        return await state.text.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    for name in ("prompt", "add_special_tokens"):
        if getattr(body, name):
            raise invalid_field(name, "is set beside messages")
    task = ChatTask(
        fields=SamplingFields.model_construct(),
        messages=body.messages,
        places=[f"messages.{idx}" for idx in range(len(body.messages))],
        functions=None if body.tools is None else [tool.function for tool in body.tools],
        add_generation_prompt=adds_generation_prompt(
            body.add_generation_prompt, bool(body.continue_final_message)
        ),
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
    )
    prompt, _ = await render_task(state, task)
    return prompt.token_ids


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    state = server_state(request)
    check_model(state, body.model)
    vocab_size = len(await state.text.vocabulary())
    for token_id in body.tokens:
        if token_id >= vocab_size:
            raise ApiError(
                400,
                f"tokens holds {token_id}; token ids are below {vocab_size}",
                param="tokens",
                code="invalid_value",
            )
    return DetokenizeResponse(prompt=await state.text.decode(body.tokens))

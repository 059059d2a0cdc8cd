"""``/tokenize`` and ``/detokenize``.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from .errors import ApiError
from .generation import server_state
from .json_body import JsonRoute
from .model_routes import check_model
from .protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from .responses import TEXT_ERRORS

router = APIRouter(route_class=JsonRoute, tags=["tokens"], responses={**TEXT_ERRORS})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """The token ids of a text, as `/v1/completions` would see them."""
    state = server_state(request)
    check_model(state, body.model)
    text = state.text
    token_ids = await text.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    )
    pieces = None
    if body.return_token_strs:
        pieces = await text.run(lambda tokenizer: tokenizer.convert_ids_to_tokens(token_ids))
    assert state.max_model_len is not None
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=state.max_model_len,
        tokens=token_ids,
        token_strs=pieces,
    )


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

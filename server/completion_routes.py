"""``/v1/completions``: text goes on from prompts.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..engine import EngineRequest, SamplingParams
from .completions import CompletionEncoder, CompletionPlan, whole_answer
from .errors import ApiError
from .fingerprint import system_fingerprint
from .generation import EventStream, generate, new_id, server_state
from .json_body import JsonRoute
from .logprobs import LogprobFormat
from .model_routes import check_model
from .protocol.completions import CompletionRequest, CompletionResponse
from .responses import GENERATION_ERRORS
from .sampling import check_room, form_names, sampling_params, value
from .state import ServerState
from .vocabulary import Vocabulary

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/completions", response_model=CompletionResponse, responses={**GENERATION_ERRORS})
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on from one prompt or several; with `stream` as server-sent events."""
    state = server_state(request)
    check_model(state, body.model)
    params = _params(body)
    prompts = await _read_prompts(state, body)
    for prompt in prompts:
        assert state.max_model_len is not None
        check_room(body.max_tokens, len(prompt.token_ids), state.max_model_len)
    plan = await _plan(state, body, prompts)
    requests = [
        EngineRequest(prompt.for_engine(), params, value(body, "priority")) for prompt in prompts
    ]
    request_id, names = plan.head["id"], form_names(body)
    if body.stream:
        return EventStream(request, request_id, requests, CompletionEncoder(plan), names)
    answer = whole_answer(plan, await generate(request, request_id, requests, names))
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Prompt:
    """``text``: None for a prompt that came as token ids."""

    text: str | None
    token_ids: list[int]

    def for_engine(self) -> dict[str, Any]:
        return {"prompt": self.text, "prompt_token_ids": self.token_ids}


def _params(body: CompletionRequest) -> SamplingParams:
    max_tokens = value(body, "max_tokens")
    if max_tokens == 0 and not body.echo:
        raise ApiError(
            400,
            "max_tokens is 0; it must be at least 1 without echo",
            param="max_tokens",
            code="invalid_value",
        )
    of_prompt = None
    if body.echo:
        # A request of no tokens has its prompt scored, or there would be nothing to do.
        of_prompt = 0 if max_tokens == 0 and body.logprobs is None else body.logprobs
    return sampling_params(
        body, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=of_prompt
    )


async def _read_prompts(state: ServerState, body: CompletionRequest) -> list[_Prompt]:
    text_processor = state.text  # not there before the engine is
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if not texts:
        return [_Prompt(None, prompt) for prompt in body.prompt if isinstance(prompt, list)]
    encoded = await text_processor.encode_batch(
        texts, add_special_tokens=value(body, "add_special_tokens")
    )
    return [_Prompt(text, token_ids) for text, token_ids in zip(texts, encoded, strict=True)]


async def _plan(
    state: ServerState, body: CompletionRequest, prompts: Sequence[_Prompt]
) -> CompletionPlan:
    has_logprobs = body.logprobs is not None or body.prompt_logprobs is not None
    skips_special = value(body, "skip_special_tokens")
    return CompletionPlan(
        body=body,
        head={
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or state.model_name,
            "system_fingerprint": system_fingerprint(state),
        },
        form=LogprobFormat(
            vocabulary=await state.text.vocabulary() if has_logprobs else Vocabulary(None),
            num_top=body.logprobs or 0,
            as_token_ids=bool(body.return_tokens_as_token_ids),
            skips_special=skips_special,
        ),
        echoes=await _echoes(state, prompts, skips_special) if body.echo else None,
    )


async def _echoes(state: ServerState, prompts: Sequence[_Prompt], skips_special: bool) -> list[str]:
    """The prompts as text."""
    vocab_size = len(await state.text.vocabulary())
    return [
        prompt.text
        if prompt.text is not None
        else await state.text.decode(
            # The engine refuses ids without a token; decoders fail on some of them.
            [token_id for token_id in prompt.token_ids if token_id < vocab_size],
            skip_special_tokens=skips_special,
        )
        for prompt in prompts
    ]

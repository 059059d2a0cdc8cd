"""Aborting requests, and steering the KV cache of a running server.

Owns: nothing.  Thread-safety: none; one event loop. What touches the engine runs on its thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from ..engine import LLMEngine, VmallocError
from .errors import ApiError
from .generation import server_state
from .json_body import JsonRoute
from .protocol.operations import (
    AbortRequest,
    AbortResult,
    ErrorBody,
    FlushResult,
    PrefixRequest,
    PrefixResult,
    ResizeRequest,
    ResizeResult,
    SleepResult,
)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 409, 503)
}

router = APIRouter(route_class=JsonRoute, tags=["administration"])
admin = APIRouter(
    route_class=JsonRoute, prefix="/admin", tags=["administration"], responses={**_ERRORS}
)


@router.post("/abort", responses={**_ERRORS, 404: {"model": ErrorBody}})
async def abort(body: AbortRequest, request: Request) -> AbortResult:
    """End running requests by the id of their response, or their ``X-Request-Id``."""
    num_aborted = server_state(request).abort(body.request_id)
    if num_aborted == 0:
        raise ApiError(
            404,
            f"request_id is {body.request_id!r:.200}; no running request has that name",
            param="request_id",
            code="request_not_found",
        )
    return AbortResult(num_aborted=num_aborted)


@admin.post("/prefix-cache/flush")
async def flush(request: Request) -> FlushResult:
    """Forget cached prefixes that are neither pinned nor in use."""
    engine = server_state(request).engine
    return FlushResult(num_pages=await engine.call(_awake(LLMEngine.flush_prefix_cache)))


@admin.post("/prefix-cache/pin")
async def pin(body: PrefixRequest, request: Request) -> PrefixResult:
    """Keep what is cached of a prompt until it is unpinned. Run the prompt once before."""
    prompt = await _prompt(body, request)
    num_tokens = await server_state(request).engine.call(
        _awake(lambda engine: engine.pin_prefix(prompt, body.cache_salt))
    )
    return PrefixResult(num_tokens=num_tokens)


@admin.post("/prefix-cache/unpin")
async def unpin(body: PrefixRequest, request: Request) -> PrefixResult:
    """Undo one pin of the same prompt."""
    prompt = await _prompt(body, request)
    num_tokens = await server_state(request).engine.call(
        _awake(lambda engine: engine.unpin_prefix(prompt, body.cache_salt))
    )
    return PrefixResult(num_tokens=num_tokens)


@admin.post("/sleep")
async def sleep(request: Request) -> SleepResult:
    """Give the KV memory back to the system until woken; running requests wait."""

    def go_to_sleep(engine: LLMEngine) -> bool:
        if not engine.is_asleep:
            try:
                engine.sleep()
            except VmallocError as error:
                raise ApiError(409, str(error), code="cannot_sleep") from error
        return engine.is_asleep

    return SleepResult(is_asleep=await server_state(request).engine.call(go_to_sleep))


@admin.post("/wake")
async def wake(request: Request) -> SleepResult:
    """Go on after a sleep. 503 if there is no memory for it now."""
    if not await server_state(request).engine.call(LLMEngine.wake):
        raise ApiError(
            503,
            "the engine still sleeps: there is no memory for its KV now",
            code="cannot_wake",
            headers={"retry-after": "1"},
        )
    return SleepResult(is_asleep=False)


@admin.post("/resize")
async def resize(body: ResizeRequest, request: Request) -> ResizeResult:
    """Move the cap on physical KV memory, also while requests run."""

    def move(engine: LLMEngine) -> int:
        engine.resize_kv_cache(body.kv_cache_memory_bytes)
        return engine.kv_stats().capacity_bytes

    return ResizeResult(kv_cache_memory_bytes=await server_state(request).engine.call(_awake(move)))


def _awake(function: Callable[[LLMEngine], int]) -> Callable[[LLMEngine], int]:
    """The function, refusing with 409 while the engine sleeps."""

    def call(engine: LLMEngine) -> int:
        if engine.is_asleep:
            raise ApiError(409, "the engine sleeps; POST /admin/wake first", code="engine_sleeping")
        return function(engine)

    return call


async def _prompt(body: PrefixRequest, request: Request) -> list[int]:
    if isinstance(body.prompt, list):
        return body.prompt
    return await server_state(request).text.encode(body.prompt)

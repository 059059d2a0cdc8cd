"""Bodies of the endpoints that tell about the server and steer it.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import ApiRequest, ApiResponse

HealthStatus = Literal["ok", "starting", "sleeping", "stuck", "draining", "stopped", "dead"]


class ErrorDetail(ApiResponse):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ApiResponse):
    """What every response with a status of 400 and above holds."""

    error: ErrorDetail


class Health(ApiResponse):
    """How the engine is."""

    status: HealthStatus
    state: str
    last_step_age_s: float | None
    loop_age_s: float | None
    startup_phase: str | None = None
    failure: str | None = None


class Version(ApiResponse):
    """Which software answers."""

    version: str


class ModelCard(ApiResponse):
    """A model as OpenAI lists it, and its context as vLLM does."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vmalloc"
    root: str | None = None
    max_model_len: int | None = None


class ModelList(ApiResponse):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AbortRequest(ApiRequest):
    """Whom to abort: the id of a response, or the ``X-Request-Id`` it was asked for with."""

    request_id: Annotated[str, Field(min_length=1, max_length=256)]


class AbortResult(ApiResponse):
    """How many requests had that name."""

    num_aborted: int


class PrefixRequest(ApiRequest):
    """A prompt whose cached KV is to be kept, or not any more."""

    prompt: str | list[int]
    cache_salt: str = ""


class PrefixResult(ApiResponse):
    """Tokens that were pinned or unpinned."""

    num_tokens: int


class FlushResult(ApiResponse):
    """Pages that were set free."""

    num_pages: int


class ResizeRequest(ApiRequest):
    """The new cap on physical KV memory."""

    kv_cache_memory_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)]


class ResizeResult(ApiResponse):
    """The cap as it is now, in whole pages."""

    kv_cache_memory_bytes: int


class SleepResult(ApiResponse):
    """Whether the engine sleeps."""

    is_asleep: bool

"""Which models are served.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from .errors import ApiError
from .generation import server_state
from .protocol.operations import ErrorBody, ModelCard, ModelList
from .state import ServerState

router = APIRouter(tags=["models"])


def check_model(state: ServerState, model: str | None) -> None:
    """Raise ``ApiError`` 404 for a model that is not served; None stands for the one that is."""
    if model is not None and model not in state.model_names:
        served = ", ".join(state.model_names)
        raise ApiError(
            404,
            f"model is {model!r}; served: {served}",
            param="model",
            code="model_not_found",
        )


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """The served model under each of its names."""
    state = server_state(request)
    return ModelList(data=[_card(state, name) for name in state.model_names])


# Names may hold slashes, as hub ids do.
@router.get("/v1/models/{model:path}", responses={404: {"model": ErrorBody}})
async def retrieve_model(model: str, request: Request) -> ModelCard:
    """One model by its name."""
    state = server_state(request)
    check_model(state, model)
    return _card(state, model)


def _card(state: ServerState, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=state.created,
        root=state.model_name,
        max_model_len=state.max_model_len,
    )

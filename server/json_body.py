"""Reads JSON as its standard has it: what other readers would take differently is refused.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

LONG_BODY_BYTES = 256 << 10
"""Longer bodies are read on another thread: megabytes take a second, in which no token would go
out."""


class JsonRoute(APIRoute):
    """A route that reads its body with ``read_json``: ``APIRouter(route_class=JsonRoute)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, on a request that reads so."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= LONG_BODY_BYTES:
            return read_json(body)
        return await asyncio.to_thread(read_json, body)


def read_json(body: bytes) -> Any:
    """The value of a document in UTF-8.

    Raises ``JSONDecodeError``, also for keys that come twice, for NaN and infinities, and for
    numbers and nesting that Python cannot hold.
    """
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise JSONDecodeError(f"it is not UTF-8 at byte {error.start}", "", 0) from error
    except RecursionError as error:
        raise JSONDecodeError("it is nested too deeply", "", 0) from error
    except ValueError as error:  # an integer of thousands of digits
        raise JSONDecodeError(str(error), "", 0) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise JSONDecodeError(f"the key {counts.most_common(1)[0][0]!r:.100} comes twice", "", 0)
    return made


def _refuse_constant(name: str) -> None:
    raise JSONDecodeError(f"{name} is no JSON", "", 0)

"""Who may come in: API keys, compared in constant time.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError

OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs", "/favicon.ico"}
)
"""What monitors and the page itself need; none of it shows or takes a prompt."""


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith("/page/")


def is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """Whether ``key`` is among ``keys``; takes the same time whichever it is."""
    candidate = key.encode("latin-1")  # as starlette decoded it
    matches = [hmac.compare_digest(candidate, one.encode()) for one in keys]
    return any(matches)


class AuthMiddleware:
    """Refuses requests without a valid ``Authorization: Bearer`` key, before their body is read."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._api_keys = config.api_keys
        self._admin_keys = config.admin_api_keys or config.api_keys
        # Whoever may administer may use the rest.
        self._user_keys = (*config.api_keys, *config.admin_api_keys) if config.api_keys else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._check(scope)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> ApiError | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/admin" or path.startswith("/admin/"):
            keys = self._admin_keys
            if not keys:
                return ApiError(
                    403,
                    "the administration is shut; start the server with --admin-api-key",
                    code="admin_disabled",
                )
        elif is_open(path) or not self._user_keys:
            return None
        else:
            keys = self._user_keys
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_one_of(key.strip(), keys):
            return None
        reason = "the API key is wrong" if key else "there is no API key; send one as Bearer token"
        return ApiError(401, reason, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

"""``/openapi.json``: what FastAPI makes of the routes, without what this server never says.

Owns: nothing.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_NEVER_USED = ("HTTPValidationError", "ValidationError")
"""FastAPI's own shape of a 422; wrong requests get OpenAI's, with 400."""


class DescribedApp(FastAPI):
    """An application whose description says only what it answers."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        schemas = schema.get("components", {}).get("schemas", {})
        for name in _NEVER_USED:
            schemas.pop(name, None)
        return schema

"""The OpenAI-compatible HTTP endpoint over the engine.

Owns: the server's public names.  Thread-safety: see each class.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "vmalloc.server":
    raise ImportError("import vmalloc.server instead: a second copy of the server is a bug")

if TYPE_CHECKING:
    from .app import create_app
    from .config import ServerConfig
    from .run import serve
    from .state import ServerState

# Loaded on first use: the clients that live here too need neither torch nor FastAPI.
_MODULE_OF = {
    "ServerConfig": "config",
    "ServerState": "state",
    "create_app": "app",
    "serve": "run",
}

__all__ = ["ServerConfig", "ServerState", "create_app", "serve"]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

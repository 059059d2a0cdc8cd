"""The OpenAI-compatible HTTP endpoint over the engine.

Owns: the server's public names.  Thread-safety: see each class.
"""

if __name__ != "vmalloc.server":
    raise ImportError("import vmalloc.server instead: a second copy of the server is a bug")

from .app import create_app
from .config import ServerConfig
from .run import serve
from .state import ServerState

__all__ = ["ServerConfig", "ServerState", "create_app", "serve"]

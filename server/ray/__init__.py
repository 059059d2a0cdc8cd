"""Replicas of a server on Ray Serve: ``serve run vmalloc.server.ray:app num_replicas=2``.

Owns: the builder that Serve looks for.  Thread-safety: none; one process, one command.

Ray is imported when an application is built: this package can be imported without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ...errors import ConfigError

__all__ = ["app", "check_ray"]


def check_ray() -> None:
    """Raise ``ConfigError`` where Ray Serve is not installed."""
    if find_spec("ray") is None:  # of a submodule it would import the package
        raise ConfigError(
            "replicas need Ray Serve, and ray cannot be imported; pip install 'vmalloc[ray]'"
        )


def app(args: dict[str, Any]) -> Any:
    """The Serve application of one model, from ``args`` by name (``ReplicaSettings.from_args``).

    Raises ``ConfigError`` for a name that is unknown and a value that cannot work, and where Ray
    Serve is not installed.
    """
    check_ray()
    from .application import build_application
    from .settings import ReplicaSettings

    return build_application(ReplicaSettings.from_args(args))

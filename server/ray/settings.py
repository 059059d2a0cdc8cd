"""Settings of an application of several replicas: validated and frozen.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...engine import ConfigError, EngineConfig
from ..config import ServerConfig

Routing = Literal["prefix", "random"]

MAX_REPLICAS = 1024

KEY_VARIABLES = {"api_keys": "VMALLOC_API_KEY", "admin_api_keys": "VMALLOC_ADMIN_API_KEY"}
"""Where keys may come from that should stand in no file; several are parted by blanks."""

_OF_THE_PROXY = frozenset({"host", "port", "uds", "ssl_certfile", "ssl_keyfile"})
"""How Serve's proxy listens is no matter of an application."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """How many replicas there are, what each takes, and who gets which request.

    Attributes:
        num_replicas: replicas, or the least number of them where ``max_replicas`` is given.
        max_replicas: most replicas that load may start. None: their number is fixed.
        routing: ``"prefix"`` sends a request where the beginning of its prompt is cached;
            ``"random"`` anywhere.
        max_imbalance: requests that a replica may have more than the least busy one and still get
            those whose prefix it caches.
        routing_seed: of what routing draws at random. None: a random one.
        target_requests: requests, waiting ones included, that one replica is meant to have; with
            more another one is started.
        target_page_usage: share of its KV pages that running requests of one replica are meant to
            hold; above, another one is started.
        upscale_delay_s, downscale_delay_s: how long load must ask for more, or for fewer.
        cpus_per_replica: cores that Ray sets aside for a replica, and threads it computes with, all
            its ranks together.
        gpus_per_replica: GPUs of a replica. None: one for each rank, where the engine runs on GPUs.
        num_ingresses: processes that take requests and route them; each knows only of what went
            through itself.
        route_timeout_s: most seconds until a replica takes up a request; then it is refused.
    """

    num_replicas: int = 1
    max_replicas: int | None = None
    routing: Routing = "prefix"
    max_imbalance: int = 8
    routing_seed: int | None = None
    target_requests: float = 32.0
    target_page_usage: float = 0.8
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    cpus_per_replica: float = 1.0
    gpus_per_replica: float | None = None
    route_timeout_s: float = 30.0
    num_ingresses: int = 1

    def __post_init__(self) -> None:
        _check_number("num_replicas", self.num_replicas, 1, MAX_REPLICAS)
        _check_number("num_ingresses", self.num_ingresses, 1, MAX_REPLICAS)
        if self.max_replicas is not None:
            _check_number("max_replicas", self.max_replicas, self.num_replicas, MAX_REPLICAS)
        if self.routing not in get_args(Routing):
            raise ConfigError(f"routing is {self.routing!r}; supported: prefix, random")
        _check_number("max_imbalance", self.max_imbalance, 0, 1 << 20)
        for name in ("target_requests", "target_page_usage", "cpus_per_replica", "route_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.target_page_usage > 1:
            raise ConfigError(
                f"target_page_usage is {self.target_page_usage}; it must be at most 1"
            )
        for name in ("upscale_delay_s", "downscale_delay_s", "gpus_per_replica"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} is {value}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """Everything that the processes of one application must know.

    Attributes:
        model: ``"demo"``, a folder or a hub id.
        tokenizer: where its tokenizer is; None: with the model.
        engine: settings of each replica's engine.
        server: settings of each replica's server.
        replicas: how many, and who gets what.
    """

    model: str = "demo"
    tokenizer: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ReplicaSettings:
        """Settings by name: ``model``, ``tokenizer``, and the fields of ``ReplicaConfig``,
        ``EngineConfig`` and ``ServerConfig``, as numbers or as text.

        Keys may come from the environment instead (``KEY_VARIABLES``).

        Raises ``ConfigError`` naming what is unknown, or has no such value.
        """
        parts: dict[str, dict[str, Any]] = {"engine": {}, "server": {}, "replicas": {}}
        own: dict[str, Any] = {}
        for name, value in args.items():
            part = _part_of(name)
            target = own if part == "" else parts[part]
            target[name] = _read(name, _TYPES[part][name], value)
        for name, variable in KEY_VARIABLES.items():
            if name not in parts["server"] and os.environ.get(variable):
                parts["server"][name] = tuple(os.environ[variable].split())
        return cls(
            **own,
            engine=EngineConfig(**parts["engine"]),
            server=ServerConfig(**parts["server"]),
            replicas=ReplicaConfig(**parts["replicas"]),
        )


_TYPES: Mapping[str, Mapping[str, Any]] = {
    "": {"model": str, "tokenizer": str | None},
    "engine": get_type_hints(EngineConfig),
    "server": get_type_hints(ServerConfig),
    "replicas": get_type_hints(ReplicaConfig),
}


def _part_of(name: str) -> str:
    """Whose setting a name is. Raises ``ConfigError``."""
    if name in _OF_THE_PROXY:
        raise ConfigError(f"{name} is a setting of Serve's proxy: give it in http_options")
    for part, types in _TYPES.items():
        if name in types:
            return part
    known = [one for types in _TYPES.values() for one in types if one not in _OF_THE_PROXY]
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{name} is not a known argument{hint}")


def _read(name: str, kind: Any, value: Any) -> Any:
    """The value as its type; text is read as a command line's."""
    if isinstance(value, str) and "tuple[str, ...]" in str(kind):
        value = tuple(value.split())
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{name} is {value!r}; {reason[:1].lower()}{reason[1:]}") from None


def _check_number(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be an integer, at least {least}")
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}; it must be between {least} and {most}")


assert len({name for types in _TYPES.values() for name in types}) == sum(
    len(fields(one)) for one in (EngineConfig, ServerConfig, ReplicaConfig)
) + len(_TYPES[""]), "two settings have one name"

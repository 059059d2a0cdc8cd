"""The sides of a comparison: a backend, and what a request reserves when it starts.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...config import CommitPolicy
from ...errors import ConfigError
from ..config import EngineConfig, KVBackendName


@dataclass(frozen=True, slots=True)
class Arm:
    """One side.

    Attributes:
        name: what tables call it.
        kv_backend, commit_policy: as in ``EngineConfig``.
        summary: what it is, in words.
    """

    name: str
    kv_backend: KVBackendName
    commit_policy: CommitPolicy
    summary: str

    def configure(self, config: EngineConfig) -> EngineConfig:
        """The same settings with this side's cache."""
        return replace(config, kv_backend=self.kv_backend, commit_policy=self.commit_policy)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("virtual", "virtual", "on_demand", "contiguous addresses, pages as tokens come"),
        Arm("paged", "paged", "on_demand", "blocks and block tables, as PagedAttention"),
        Arm("max_length", "virtual", "max_length", "the longest sequence reserved at the start"),
        Arm(
            "power_of_two", "virtual", "power_of_two", "the output reserved as a power of two"
        ),
        Arm("oracle", "virtual", "oracle", "just the length it will have reserved"),
    )
}  # fmt: skip
"""By name. The last three reserve ahead of need, as older systems do; see ``CommitPolicy``."""

DEFAULT_ARMS = ("virtual", "paged")


def choose_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """The sides of these names. Raises ``ConfigError`` for unknown ones and for fewer than two."""
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"backends has {name!r}; supported: {', '.join(ARMS)}")
    if len(set(names)) != len(names):
        raise ConfigError(f"backends is {', '.join(names)}; each can be named once")
    if len(names) < 2:
        raise ConfigError(f"backends is {', '.join(names)}; a comparison needs at least 2")
    return tuple(ARMS[name] for name in names)

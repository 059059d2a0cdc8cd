"""What a user may set: it travels in vLLM's ``additional_config`` to scheduler and workers alike.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from threading import TIMEOUT_MAX
from typing import Any

from ...errors import ConfigError

KEY = "vmalloc"
"""Under which ``additional_config`` carries the options."""

WORKER_CLS = "vmalloc.integrations.vllm.ElasticWorker"
SCHEDULER_CLS = "vmalloc.integrations.vllm.ElasticScheduler"


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticOptions:
    """How much memory the KV cache may hold, and for how long.

    Attributes:
        capacity_bytes: cap on the KV memory of one worker. None: all of the pool that vLLM sized.
        cached_fraction: share of the pool that may hold nothing but cached prefixes, and memory
            kept for reuse, while requests run.
        idle_s: seconds without a request after which all of that goes back too; None: never.
        retry_s: seconds before a worker that ran out of memory is asked for more again.
        page_bytes: physical unit. None: the device's (2 MiB on CUDA; on the CPU what fits the
            blocks, at least 64 KiB).
    """

    capacity_bytes: int | None = None
    cached_fraction: float = 0.1
    idle_s: float | None = 10.0
    retry_s: float = 30.0
    page_bytes: int | None = None

    def __post_init__(self) -> None:
        # They may come from JSON on a command line.
        if not _is_number(self.cached_fraction) or not 0 <= self.cached_fraction <= 1:
            raise ConfigError(f"cached_fraction is {self.cached_fraction!r}; it must be in [0, 1]")
        for name in ("capacity_bytes", "page_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value <= 0):
                raise ConfigError(f"{name} is {value!r}; it must be an integer above 0")
        if self.idle_s is not None and not _is_duration(self.idle_s):
            raise ConfigError(f"idle_s is {self.idle_s!r}; it must be seconds above 0, or None")
        if not _is_duration(self.retry_s):
            raise ConfigError(f"retry_s is {self.retry_s!r}; it must be seconds above 0")

    @classmethod
    def of(cls, vllm_config: Any) -> ElasticOptions:
        """The options of a ``VllmConfig``.

        Raises:
            ConfigError: an option that there is not, or a value that cannot work.
        """
        config = vllm_config.additional_config
        settings = config.get(KEY, {}) if isinstance(config, dict) else {}
        if not isinstance(settings, dict):
            raise ConfigError(f"additional_config[{KEY!r}] is {settings!r}; it must be a dict")
        names = {field.name for field in fields(cls)}
        for name in settings:
            if name not in names:
                raise ConfigError(
                    f"additional_config[{KEY!r}] has {name!r}; options: {', '.join(sorted(names))}"
                )
        return cls(**settings)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_duration(value: Any) -> bool:
    """Seconds that a timer can wait."""
    return _is_number(value) and 0 < value <= TIMEOUT_MAX


def engine_args(**options: Any) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``LLM`` or ``AsyncEngineArgs`` that swap the KV memory in.

    Args:
        options: fields of ``ElasticOptions``.

    Raises:
        ConfigError: as ``ElasticOptions``.
    """
    chosen = ElasticOptions(**options)
    return {
        "worker_cls": WORKER_CLS,
        "scheduler_cls": SCHEDULER_CLS,
        "additional_config": {KEY: asdict(chosen)},
    }

"""Makes KV caches of one kind on one device, each with the attention kernels that suit it.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import choose_backend, create_kv_backend
from ..backend import KVBackend
from ..config import KVCacheConfig
from ..errors import ConfigError
from ..kernels.select import AttentionKernels, select_kernels
from .config import KVBackendName, KVDriverName


@dataclass(frozen=True, slots=True)
class CacheFactory:
    """What the caches of one engine have in common, its own and those of checks at load.

    Attributes:
        device: where their tensors live.
        kind: ``EngineConfig.kv_backend``.
        driver: ``EngineConfig.kv_driver``.

    Raises ``ConfigError`` for a kind or driver that cannot work there.
    """

    device: torch.device
    kind: KVBackendName = "auto"
    driver: KVDriverName = "auto"

    def __post_init__(self) -> None:
        if self.driver == "null":
            raise ConfigError(
                "kv_driver is 'null'; it only counts pages, and an engine computes with K and V"
            )
        choose_backend(self.kind, str(self.device), self.driver)

    def make(self, config: KVCacheConfig, num_heads: int) -> tuple[KVBackend, AttentionKernels]:
        """A cache, and kernels for ``num_heads`` query heads; they tell how far past an end they
        read, and the cache backs as much."""
        choice = choose_backend(self.kind, str(self.device), self.driver)
        kernels = select_kernels(
            config.layers,
            device=self.device,
            has_block_table=choice.kind == "paged",
            num_heads=num_heads,
        )
        config = replace(
            config,
            device=str(self.device),
            driver=self.driver,
            lookahead_tokens=kernels.lookahead_rows,
        )
        return create_kv_backend(config, choice.kind), kernels

"""One configuration of a simulation, and the engine it makes.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vmalloc import KVCacheConfig, PagedKVCache, VirtualKVCache, _core
from vmalloc.core_setup import MAX_SPARE_PAGES
from vmalloc.engine.config import PreemptionMode
from vmalloc.engine.preemption_cost import PreemptionCost
from vmalloc.engine.scheduler import Scheduler

from .clock import DriverTime, SimulatedClock
from .engine import SimulatedEngine
from .hardware import DEVICES, DriverLatency
from .models import MODELS, Deployment, StepWork

Kind = Literal["virtual", "paged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is simulated.

    Attributes:
        kind: which KV cache.
        deployment: the model, on which GPUs.
        max_num_seqs, max_num_batched_tokens: the engine's settings.
        page_bytes, layers_per_group, commit_ahead_tokens: of the virtual cache; None: all layers.
        low_watermark: share of memory that new sequences, and the worker, leave alone.
        block_size: of the paged cache.
        capacity_bytes: memory for K and V on each GPU; None: what weights leave.
        latency: of the driver.
        prefix_caching, preemption_mode, swap_bytes: the engine's settings.
    """

    kind: Kind = "virtual"
    deployment: Deployment = field(
        default_factory=lambda: Deployment(MODELS["Llama-3.1-8B"], DEVICES["H200"])
    )
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    page_bytes: int = 2 << 20
    layers_per_group: int | None = None
    commit_ahead_tokens: int = 4
    low_watermark: float = 0.01
    block_size: int = 16
    capacity_bytes: int | None = None
    latency: DriverLatency = field(default_factory=DriverLatency)
    prefix_caching: bool = False
    preemption_mode: PreemptionMode = "recompute"
    swap_bytes: int = 0

    def kv_config(self, max_seq_len: int) -> KVCacheConfig:
        """The cache's settings, for sequences of that length."""
        return KVCacheConfig(
            layers=self.deployment.layers,
            max_num_seqs=self.max_num_seqs,
            max_seq_len=max_seq_len,
            capacity_bytes=self.capacity_bytes or self.deployment.kv_bytes,
            driver="null",
            page_bytes=self.page_bytes,
            layers_per_group=self.layers_per_group,
            commit_ahead_tokens=self.commit_ahead_tokens,
            low_watermark=self.low_watermark,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
            swap_bytes=self.swap_bytes,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values, for the result file."""
        deployment = self.deployment
        values = {
            name: value
            for name, value in asdict(replace(self, deployment=None)).items()  # type: ignore[arg-type]
            if name != "deployment"
        }
        return {
            **values,
            "model": deployment.model.name,
            "device": deployment.device.name,
            "num_devices": deployment.num_devices,
            "capacity_bytes": self.capacity_bytes or deployment.kv_bytes,
            "token_bytes": sum(layer.token_bytes for layer in deployment.layers),
        }

    @contextmanager
    def engine(self, max_seq_len: int) -> Iterator[tuple[SimulatedEngine, SimulatedClock]]:
        """An engine with an empty cache, at time 0."""
        config = self.kv_config(max_seq_len)
        driver = _core.make_null_driver(self.page_bytes)
        backend: VirtualKVCache | PagedKVCache
        if self.kind == "virtual":
            backend = VirtualKVCache(config, driver=driver, spare_pages=MAX_SPARE_PAGES)
        else:
            backend = PagedKVCache(config)
        with backend:
            clock = SimulatedClock()
            clock.watch(backend, self.deployment.device.host_bandwidth)
            scheduler = Scheduler(
                backend,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=max(self.max_num_batched_tokens, self.max_num_seqs),
                preemption_mode=self.preemption_mode,
                cost=self._cost(),
                clock=clock,
            )
            cache = backend if isinstance(backend, VirtualKVCache) else None
            calls = DriverTime(cache, driver, self.latency)
            yield (
                SimulatedEngine(backend, scheduler, clock, calls, self.deployment.step_seconds),
                clock,
            )

    def _cost(self) -> PreemptionCost:
        """What the device would measure, as the first guess."""
        work = StepWork(1024, 1, 1024, 1024 * 1025 // 2)
        return PreemptionCost(
            prefill_seconds=self.deployment.step_seconds(work) / 1024,
            swap_bandwidth=self.deployment.device.host_bandwidth,
        )

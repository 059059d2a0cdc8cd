"""vLLM's worker of this platform, with its KV cache in our reservation.

Owns: the worker's ``KVMemory``.  Thread-safety: none; vLLM calls a worker from one thread.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.platforms import current_platform

from ...errors import ConfigError
from .extents import Extents
from .kv_memory import KVMemory
from .plan import RefusedOutput, block_ids_of, plan_of, without_tokens
from .supported import check_supported

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # not yet run on a GPU
else:
    raise ImportError(
        f"vmalloc.integrations.vllm runs on the CPU and on CUDA, not on "
        f"{current_platform.device_name or 'this platform'}"
    )


class ElasticWorker(PlatformWorker):  # type: ignore[misc]
    """For ``--worker-cls``.

    Raises:
        ConfigError: the configuration is not supported.
    """

    def __init__(self, vllm_config: Any, *args: Any, **keywords: Any) -> None:
        self._elastic_options = check_supported(vllm_config)
        self._kv_memory: KVMemory | None = None
        self._refused: RefusedOutput | None = None
        super().__init__(vllm_config, *args, **keywords)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        extents = Extents.of(kv_cache_config, self.device.type, self._elastic_options.page_bytes)
        self._kv_memory = KVMemory(extents, self.device, self._elastic_options, _least_of_workers)
        super().initialize_from_config(kv_cache_config)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        if tag == "kv_cache" and self._kv_memory is not None:
            return self._kv_memory.instead_of_zeros()
        context: AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return context

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._kv_memory is not None:
            plan = plan_of(scheduler_output)
            if plan is None:
                self._kv_memory.commit_blocks(block_ids_of(scheduler_output))
            elif refusal := self._kv_memory.apply(plan):
                return self._refuse(scheduler_output, refusal)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._refused is not None:
            output, self._refused = self._refused, None
            return output
        return super().sample_tokens(grammar_output)

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)  # weights, where vLLM can; on the CPU it only logs that it cannot
        if self._kv_memory is not None:
            self._kv_memory.drop()

    def discard(self, tags: tuple[str, ...]) -> None:
        if "kv_cache" in tags and self._kv_memory is not None:
            self._kv_memory.drop()
        others = tuple(tag for tag in tags if tag != "kv_cache")
        if others:
            super().discard(others)

    def shutdown(self) -> None:
        super().shutdown()
        if self._kv_memory is not None:
            self._kv_memory.close()

    def kv_memory_stats(self) -> dict[str, int]:
        """For ``LLM.collective_rpc("kv_memory_stats")``; see ``KVMemory.stats``."""
        return self._kv_memory.stats() if self._kv_memory is not None else {}

    def resize_kv_memory(self, capacity_bytes: int) -> None:
        """For ``collective_rpc``: move the cap; running requests that do not fit are preempted."""
        if self._kv_memory is None:
            raise ConfigError("the model has no KV cache to resize")
        self._kv_memory.resize(capacity_bytes)

    def _refuse(self, scheduler_output: Any, refusal: RefusedOutput) -> Any:
        step = without_tokens(scheduler_output)
        output = super().execute_model(step)
        if not scheduler_output.total_num_scheduled_tokens:
            return output
        if self.model_runner.is_pooling_model:
            return refusal
        self._refused = refusal  # what the engine asks for next, as after a step that ran
        return None


def _least_of_workers(number: int) -> int:
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return number
    numbers = torch.tensor([number], dtype=torch.int64)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(numbers.item())

"""vLLM's scheduler that also decides which blocks have memory.

The decision travels with each step (``plan.py``). Where a worker cannot follow it, the step does
not run: its requests are preempted and computed again, with fewer blocks to go round.

Owns: the limit on memory, and when it moves.  Thread-safety: none; the engine core's thread.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from ...errors import ConfigError
from .block_pool import ElasticBlockPool
from .extents import Extents
from .options import ElasticOptions
from .plan import MemoryPlan, RefusedOutput, attach
from .supported import check_supported

logger = init_logger("vllm.vmalloc")

IDLE_SHARE = 0.9
"""The scheduler takes idle memory for gone a little before the workers drop it."""


class ElasticScheduler(Scheduler):  # type: ignore[misc]
    """For ``--scheduler-cls``; becomes vLLM's asynchronous scheduler where that is on.

    Raises:
        ConfigError: the configuration is not supported, or ``capacity_bytes`` is too small for one
            request of ``max_model_len``.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **keywords: Any) -> ElasticScheduler:
        if cls is ElasticScheduler and vllm_config.scheduler_config.async_scheduling:
            return object.__new__(AsyncElasticScheduler)
        return object.__new__(cls)

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **keywords: Any) -> None:
        self._options = check_supported(vllm_config)
        device_type = vllm_config.device_config.device_type
        self._extents = Extents.of(kv_cache_config, device_type, self._options.page_bytes)
        self._max_extents = _max_extents(self._extents, self._options, vllm_config, kv_cache_config)
        super().__init__(vllm_config, kv_cache_config, *args, **keywords)
        pool = ElasticBlockPool.take_over(self.kv_cache_manager.block_pool, self._extents)
        self._queue = pool.free_block_queue
        self._queue.limit = self._queue.cap = self._max_extents
        # vLLM takes its share of all blocks; only those under the cap are ever free.
        self.kv_cache_manager.watermark_blocks = int(
            self.scheduler_config.watermark * self._queue.num_blocks_under_cap
        )
        self._max_idle = int(self._options.cached_fraction * self._extents.num_extents)
        self._is_told_nothing = True  # the next plan is a complete one
        self._num_refusals = 0
        self._limited_until = 0.0
        self._idle_since: float | None = None

    def schedule(self, *args: Any, **keywords: Any) -> SchedulerOutput:
        now = time.monotonic()
        self._forget_what_idled_away(now)
        if self._limited_until and now > self._limited_until:
            self._limited_until = 0.0
            self._queue.limit = self._max_extents
        output = super().schedule(*args, **keywords)
        if not output.kv_cache_block_copies:  # what this step copies from may be free already
            self._queue.trim(self._max_idle)
        is_idle = self._queue.num_used_blocks == 1 and not output.total_num_scheduled_tokens
        self._idle_since = now if is_idle else None
        attach(output, self._make_plan(is_idle))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if isinstance(model_runner_output, RefusedOutput):
            self._accept_refusal(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def reset_prefix_cache(self, *args: Any, **keywords: Any) -> bool:
        done: bool = super().reset_prefix_cache(*args, **keywords)
        if done:
            # Before a sleep: the workers are about to drop everything by themselves.
            self._start_over()
        return done

    def _make_plan(self, is_idle: bool) -> MemoryPlan:
        commit, decommit = self._queue.take_changes()
        is_complete, self._is_told_nothing = self._is_told_nothing, False
        if is_complete:
            commit, decommit = self._queue.take_all(), ()
        return MemoryPlan(commit, decommit, is_complete, is_idle, self._num_refusals)

    def _forget_what_idled_away(self, now: float) -> None:
        """Workers drop what nobody used for ``idle_s``; believe it before they do it."""
        if self._idle_since is None or self._options.idle_s is None:
            return
        if now - self._idle_since > IDLE_SHARE * self._options.idle_s:
            self._start_over()
        self._idle_since = None

    def _start_over(self) -> None:
        """Forget all that is merely cached, and tell the workers everything anew."""
        self._queue.drop_cached()
        self._is_told_nothing = True

    def _accept_refusal(self, refusal: RefusedOutput) -> None:
        if refusal.number <= self._num_refusals:
            return  # a step that was on its way when an earlier one was refused
        self._num_refusals = refusal.number
        now = time.monotonic()
        if refusal.num_held:
            self._queue.limit = min(refusal.num_held, self._max_extents)
            self._limited_until = now + self._options.retry_s
            logger.warning(
                "No memory for more KV blocks: %d of %d extents for the next %s s.",
                self._queue.limit,
                self._extents.num_extents,
                self._options.retry_s,
            )
        # Blocks of the step count as computed and are not, so what they cached must go too. All
        # steps still on their way are refused as well, and bring no tokens: not for the requests
        # either that were preempted since, whose tokens vLLM would deliver.
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        for request in self.requests.values():
            request.drop_stale_output |= request.num_stale_output_tokens > 0
        self.prev_step_scheduled_req_ids.clear()
        self._forget_encoder_outputs()
        self._start_over()

    def _forget_encoder_outputs(self) -> None:
        """Those of the refused steps count as computed and are not; workers drop the others."""
        manager = self.encoder_cache_manager
        if hasattr(manager, "cached"):  # that of encoder-decoder models computes them anew anyway
            gone = [*manager.freed, *manager.cached]
            manager.reset()
            manager.freed.extend(gone)


class AsyncElasticScheduler(ElasticScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler."""


def _max_extents(
    extents: Extents, options: ElasticOptions, vllm_config: Any, kv_cache_config: Any
) -> int:
    if options.capacity_bytes is None:
        return extents.num_extents
    extent_bytes = extents.max_extent_pages * extents.page_bytes
    max_extents = min(options.capacity_bytes // extent_bytes, extents.num_extents)
    max_len = vllm_config.model_config.max_model_len
    num_blocks = 1 + sum(
        group.kv_cache_spec.max_num_blocks_per_req(vllm_config, max_len)
        for group in kv_cache_config.kv_cache_groups
    )
    least = -(-num_blocks // extents.blocks_per_extent) * extent_bytes
    if max_extents * extent_bytes < least:
        raise ConfigError(
            f"capacity_bytes is {options.capacity_bytes}; one request of max_model_len {max_len} "
            f"needs {least}"
        )
    return max_extents

"""What scheduler and worker tell each other, beside what vLLM sends anyway.

The plan is an attribute of the ``SchedulerOutput`` that vLLM hands, or pickles, to its workers each
step; the refusal is a ``ModelRunnerOutput``, which comes back the same way.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.outputs import ModelRunnerOutput

ATTRIBUTE = "vmalloc_plan"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Which extents have memory in a step.

    Attributes:
        commit: extents that the step needs and that had no memory before.
        decommit: extents that nobody needs any more, after what was enqueued before this step.
        is_complete: ``commit`` is all that has memory; whatever else has goes.
        is_idle: no request is left, so nothing but the null block is needed until the next plan.
        num_refusals_seen: refusals that the scheduler has acted on.
    """

    commit: tuple[int, ...]
    decommit: tuple[int, ...]
    is_complete: bool
    is_idle: bool
    num_refusals_seen: int


@dataclass
class RefusedOutput(ModelRunnerOutput):  # type: ignore[misc]
    """A step that did not run, because a worker could not get its memory.

    Attributes:
        number: which refusal it is, counted from 1. Steps that were on their way when the first
            was refused bear its number.
        num_held: extents that the worker does have memory for; 0 if it was not for lack of memory.
    """

    number: int = 0
    num_held: int = 0


def refused(number: int, num_held: int) -> RefusedOutput:
    return RefusedOutput(req_ids=[], req_id_to_index={}, number=number, num_held=num_held)


def attach(scheduler_output: Any, plan: MemoryPlan) -> None:
    """Send ``plan`` along with a step; instances of vLLM's dataclass pickle what they are given."""
    setattr(scheduler_output, ATTRIBUTE, plan)


def plan_of(scheduler_output: Any) -> MemoryPlan | None:
    """None for a step that no scheduler made, such as those that warm kernels up."""
    plan: MemoryPlan | None = getattr(scheduler_output, ATTRIBUTE, None)
    return plan


def without_tokens(scheduler_output: Any) -> Any:
    """The same step with nothing to compute: the runner learns of new and finished requests only.

    The scheduler preempts every request of a refused step, and describes them anew.
    """
    return replace(
        scheduler_output,
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
    )


def block_ids_of(scheduler_output: Any) -> set[int]:
    """Blocks that a step without a plan names."""
    tables = [request.block_ids for request in scheduler_output.scheduled_new_reqs]
    tables += [ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids]
    return {block_id for table in tables for group in table for block_id in group}

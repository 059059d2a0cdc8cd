"""What the other rank runs in tests of faults: the real follower, on a machine that fails."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch

from vmalloc.engine.model_runner import ModelRunner
from vmalloc.engine.packed_batch import PackedBatch
from vmalloc.engine.tensor_parallel import follower
from vmalloc.engine.tensor_parallel.facts import version_facts
from vmalloc.engine.tensor_parallel.rank_channel import RankChannel
from vmalloc.engine.tensor_parallel.sharded_model import load_sharded_model
from vmalloc.errors import DriverError
from vmalloc.plans import PlanExecutor

FAULT_FILE = "VMALLOC_TEST_FAULT_FILE"
"""Names a file with the fault that this rank has now, and a number for it: ``"dies 5"``.

little_memory N: the system refuses it pages beyond N bytes of the memory file.
cannot_map N: every N-th plan ends half-way in a driver's error.
dies, is_late: in the middle of computing the next step.
other_version, other_dtype: from the start.
"""

LATE_S = 600.0


def follow(channel: RankChannel) -> None:
    """Be a rank with whatever fault the file names."""
    fault = _Fault(Path(os.environ[FAULT_FILE]))
    fault.install()
    follower.follow(channel)


class _Fault:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_plans = 0
        self._num_layers = 0

    def install(self) -> None:
        carry_out, compute = PlanExecutor.carry_out, ModelRunner.compute
        forward, facts = torch.nn.Linear.forward, version_facts
        load = load_sharded_model

        def carry_out_or_not(executor: PlanExecutor, operations: Any) -> None:
            operations = list(operations)
            if self._fails():
                carry_out(executor, operations[: len(operations) // 2])
                raise DriverError("mmap", 12, "ENOMEM", "fault injection")
            carry_out(executor, operations)

        def compute_counting(runner: ModelRunner, batch: PackedBatch) -> torch.Tensor:
            self._num_layers = 0
            return compute(runner, batch)

        def forward_or_not(layer: torch.nn.Linear, tensor: torch.Tensor) -> torch.Tensor:
            self._num_layers += 1
            if self._num_layers == 5:
                self._end()
            return forward(layer, tensor)

        def other_facts() -> Any:
            name, _ = self._now()
            return {**facts(), "vmalloc": "0.0.0"} if name == "other_version" else facts()

        def load_other(name: str, dtype: str, *more: Any) -> torch.nn.Module:
            return load(name, "bfloat16" if self._now()[0] == "other_dtype" else dtype, *more)

        PlanExecutor.carry_out = carry_out_or_not  # type: ignore[method-assign]
        ModelRunner.compute = compute_counting  # type: ignore[method-assign]
        torch.nn.Linear.forward = forward_or_not  # type: ignore[method-assign]
        follower.version_facts = other_facts  # type: ignore[attr-defined]
        follower.load_sharded_model = load_other  # type: ignore[attr-defined]

    def _now(self) -> tuple[str, int]:
        name, _, number = self._path.read_text().partition(" ")
        return name, int(number or 0)

    def _fails(self) -> bool:
        name, number = self._now()
        limit = number if name == "little_memory" else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        self._num_plans += 1
        return name == "cannot_map" and self._num_plans % number == 0

    def _end(self) -> None:
        name, _ = self._now()
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "is_late":
            time.sleep(LATE_S)

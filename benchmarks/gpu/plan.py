"""What the GPU benchmark runs, in order of importance, and how its time is shared out.

Owns: the list of sections, and the count of seconds that are left.
Thread-safety: none; the orchestrator's one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOTAL_SECONDS = 525.0
"""All of it, so that a limit of nine minutes around the command leaves room for its start."""

RESERVED_SECONDS = 6.0
"""Kept back to write the results and print the summary."""


@dataclass(frozen=True)
class SectionPlan:
    """One section: a module of this package, in a process of its own.

    Attributes:
        name: its name in the results and for ``--sections``.
        module: file of this folder that it runs.
        limit_s: most seconds it may take.
        minimum_s: with fewer than that left, it is not worth starting.
        what: what it answers, for people.
        is_required: whether its failure fails the whole command.
    """

    name: str
    module: str
    limit_s: float
    minimum_s: float
    what: str
    is_required: bool = False


SECTIONS = (
    SectionPlan("prepare", "prepare", 150, 5, "wheels unpacked, extension built", True),
    SectionPlan("facts", "facts", 45, 8, "versions, device, driver probes, ceilings"),
    SectionPlan("tests", "gpu_tests", 100, 15, "pytest tests/gpu on the real driver", True),
    SectionPlan("kernel_probes", "kernel_probes", 70, 15, "rows that kernels touch past the end"),
    SectionPlan("driver_calls", "driver_calls", 45, 12, "latency of each driver call"),
    SectionPlan("attention", "attention", 70, 20, "contiguous against block table"),
    SectionPlan("serving", "serving", 110, 40, "8B-shaped model end to end"),
    SectionPlan("layout", "layout_dial", 45, 15, "layers per group x page size"),
    SectionPlan("commit_jitter", "commit_jitter", 35, 12, "commits inline against ahead"),
    SectionPlan("peers", "peers", 40, 10, "other allocators on the same work"),
)


class Budget:
    """Seconds that are left of a total.

    Args:
        total_s: all there are, from now on.
        clock: seconds that only grow.
    """

    def __init__(self, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + total_s

    def left_s(self) -> float:
        """Seconds left; below 0 once they are overdrawn."""
        return self._end - self._clock()

    def grant_s(self, section: SectionPlan, later: Sequence[SectionPlan] = ()) -> float | None:
        """How long a section may take now; None if so little is left that it is skipped.

        Beyond its own minimum it leaves the later ones theirs.
        """
        left = self.left_s() - RESERVED_SECONDS
        spare = left - sum(one.minimum_s for one in later)
        granted = min(section.limit_s, max(spare, section.minimum_s))
        return granted if left >= section.minimum_s else None


def choose_sections(names: str | None) -> list[SectionPlan]:
    """The sections that a comma-separated list names, in the order of ``SECTIONS``; None: all.

    ``prepare`` always runs: nothing works without it.

    Raises:
        ValueError: a name that is none.
    """
    if names is None:
        return list(SECTIONS)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = wanted - {section.name for section in SECTIONS}
    if unknown:
        known = ", ".join(section.name for section in SECTIONS)
        raise ValueError(f"sections {', '.join(sorted(unknown))}: unknown; there are {known}")
    return [one for one in SECTIONS if one.name in wanted or one.name == "prepare"]

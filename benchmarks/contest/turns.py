"""Peers taking turns: a check first, then round by round, in an order that is shuffled.

Owns: the runs and what failed.  Thread-safety: one process at a time runs a model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from .environments import Environments, Unavailable
from .peers import Peer
from .plan import WORKLOADS, Plan, make_check, make_job
from .runs import RunFailed, run_peer
from .shapes import Shape
from .summary import compare_tokens
from .workers.measured import Job

REFERENCE = "hf-generate"
NUM_TRIES = 2
Run = dict[str, Any]


class Contest:
    """Runs a plan; a peer that fails is dropped from where it failed on, and the rest goes on."""

    def __init__(self, plan: Plan, environments: Environments, progress: Progress) -> None:
        self.plan = plan
        self.runs: list[Run] = []
        self.checks: list[Run] = []
        self.failures: list[Run] = []
        self._environments = environments
        self._progress = progress
        self._task = progress.add_task("peers", total=plan.num_turns)
        self._shuffler = random.Random(plan.seed)
        self._out: set[tuple[str, str, str]] = set()

    def rounds(self) -> Iterator[None]:
        """Runs a round of a shape each time that it is asked for more."""
        for shape in self.plan.shapes:
            self._check(shape)
            for number in range(self.plan.num_runs):
                for workload in self.plan.workloads:
                    job = make_job(shape, workload, self.plan)
                    for peer in self._shuffler.sample(self.plan.peers, len(self.plan.peers)):
                        self._take_turn(peer, shape, workload, job, number)
                yield

    def _check(self, shape: Shape) -> None:
        """Greedy tokens of every peer against the reference's, where it takes part."""
        job = make_check(shape, self.plan)
        tokens: dict[str, list[list[int]]] = {}
        for peer in sorted(self.plan.peers, key=lambda peer: peer.name != REFERENCE):
            run = self._try(peer, shape, "", job)
            if run is None:
                self._out |= {(peer.name, shape.name, workload) for workload in WORKLOADS}
            else:
                tokens[peer.name] = [stream["token_ids"] for stream in run["streams"]]
        if REFERENCE in tokens:
            for name in (peer.name for peer in self.plan.peers if peer.name in tokens):
                row = {"shape": shape.name, "peer": name, "reference": REFERENCE}
                self.checks.append(row | compare_tokens(tokens[REFERENCE], tokens[name]))

    def _take_turn(self, peer: Peer, shape: Shape, workload: str, job: Job, number: int) -> None:
        if (peer.name, shape.name, workload) in self._out:
            self._progress.advance(self._task)
            return
        run = self._try(peer, shape, workload, job)
        if run is None:
            self._out.add((peer.name, shape.name, workload))
            return
        del run["streams"]
        place = {"peer": peer.name, "shape": shape.name, "workload": workload, "round": number}
        self.runs.append(place | run)

    def _try(self, peer: Peer, shape: Shape, workload: str, job: Job) -> Run | None:
        """A run, if possible a quiet one; None if it failed, which is noted."""
        self._progress.update(self._task, description=f"{shape.name} {workload} {peer.name}")
        is_check = not workload
        try:
            python = self._environments.python(peer.environment)
            options = peer.resolved_options(shape, self._environments)
            if is_check and peer.name == REFERENCE:
                options["batch"] = 1
            job = replace(job, options=options)
            for _ in range(NUM_TRIES):
                run = run_peer(peer, python, job, self.plan.limits)
                place = f"{shape.name} {workload or 'check'}"
                self._progress.console.print(f"{place} {_line(peer, run)}", highlight=False)
                if is_check or run["is_quiet"]:
                    break
            return run
        except (Unavailable, RunFailed) as error:
            failure = {"peer": peer.name, "shape": shape.name, "workload": workload}
            self.failures.append(failure | {"reason": str(error)})
            self._progress.console.print(f"{peer.name} left out: {error}", markup=False)
            return None
        finally:
            self._progress.advance(self._task)


def _line(peer: Peer, run: Run) -> str:
    noise = "" if run["is_quiet"] else f", {run['foreign_cores']:.2f} foreign cores"
    return f"{peer.name}: {run['tokens_per_s']:,.0f} tokens/s after {run['ready_s']:.1f} s{noise}"

"""How KV rows and pages should be cut on a CPU: step time, waste and sharing by both dials.

``layers_per_group`` says how many layers' K and V of a token share a row, ``page_size`` how large a
physical page is. One model is served under every setting in turn, round by round, on one thread
pool; memory and time of a setting come from the same runs.

- *time*: tokens per second of CPU time, all threads, in a ragged workload and in one whose requests
  share a prompt beginning. What another program takes does not count.
- *waste*: committed over live KV bytes, summed over the steps of the ragged workload.
- *sharing*: the same for the shared beginning, where live bytes count once: pages too large to be
  shared show here.

Owns: nothing.  Thread-safety: one run at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contest import environments
from contest.offline import open_llm, serve
from contest.plan import Plan, make_job
from contest.runs import Limits
from contest.shapes import HEAD_DIM, SHAPES, Shape
from contest.workers.measured import Job
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vmalloc.measuring.provenance import provenance, spread, write_json

WORKLOADS = ("offline", "prefix")
PAGE_TOKENS = (16, 64)
KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Dial:
    """One setting; None is what the engine chooses."""

    layers_per_group: int | None = None
    page_bytes: int | None = None


def dials_of(shape: Shape) -> list[Dial]:
    """The default, then one, two and all layers a row in pages of a few tokens."""
    row_bytes = 2 * shape.num_kv_heads * HEAD_DIM * 4
    dials = [Dial()]
    for num_layers in (1, 2, shape.num_layers):
        for tokens in PAGE_TOKENS:
            page_bytes = 4 * KIB
            while 2 * page_bytes <= tokens * num_layers * row_bytes:
                page_bytes *= 2
            dials.append(Dial(num_layers, page_bytes))
    return dials


class Contender:
    """An engine under one setting, and what its runs gave."""

    def __init__(self, dial: Dial, job: Job) -> None:
        self._llm = open_llm(job, page_size=dial.page_bytes, layers_per_group=dial.layers_per_group)
        config = self._llm.config
        self.dial = Dial(config.layers_per_group, config.page_size)
        self.is_default = dial == Dial()
        self.runs: dict[str, list[dict[str, float]]] = {}

    def warm_up(self, job: Job) -> None:
        """A few requests that are not measured."""
        serve(self._llm, job, job.warm_up)

    def measure(self, workload: str, job: Job) -> None:
        """One measured run from a cold prefix cache."""
        engine = self._llm.engine
        engine.flush_prefix_cache()
        before, started, cpu = self._llm.kv_stats(), time.perf_counter(), time.process_time()
        tokens = serve(self._llm, job, job.requests)
        run = {
            "tokens_per_s": tokens / (time.perf_counter() - started),
            "tokens_per_cpu_s": tokens / (time.process_time() - cpu),
        }
        after = self._llm.kv_stats()
        committed = after.committed_byte_steps - before.committed_byte_steps
        live = after.live_byte_steps - before.live_byte_steps
        self.runs.setdefault(workload, []).append({**run, "committed_per_live": committed / live})

    def summary(self) -> dict[str, Any]:
        """Medians with their range, by workload."""
        return {
            "layers_per_group": self.dial.layers_per_group,
            "page_bytes": self.dial.page_bytes,
            "is_default": self.is_default,
            "workloads": {
                workload: {name: spread([run[name] for run in runs]) for name in runs[0]}
                for workload, runs in self.runs.items()
            },
        }


def measure(shape: Shape, plan: Plan, num_runs: int, progress: Progress) -> list[dict[str, Any]]:
    """All settings of one shape."""
    jobs = {workload: make_job(shape, workload, plan) for workload in WORKLOADS}
    contenders = [Contender(dial, jobs["offline"]) for dial in dials_of(shape)]
    total = len(contenders) * len(WORKLOADS) * num_runs
    task = progress.add_task(shape.name, total=total)
    for contender in contenders:
        contender.warm_up(jobs["offline"])
    for idx in range(num_runs):
        order = contenders if idx % 2 == 0 else contenders[::-1]
        for workload, job in jobs.items():
            for contender in order:
                contender.measure(workload, job)
                progress.advance(task)
    return [{"shape": shape.name, **contender.summary()} for contender in contenders]


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """One line a setting, as docs/benchmarks.md has them."""
    table = Table("model", "layers a row", "page", "tokens per CPU s", "waste", "shared prefix", "")
    for row in rows:
        offline, prefix = (row["workloads"][workload] for workload in WORKLOADS)
        table.add_row(
            row["shape"],
            str(row["layers_per_group"]),
            f"{row['page_bytes'] // KIB} KiB",
            "{median:,.0f} ({min:,.0f}..{max:,.0f})".format(**offline["tokens_per_cpu_s"]),
            f"{offline['committed_per_live']['median'] - 1:.1%}",
            "{:,.0f}, {:.1%}".format(
                prefix["tokens_per_cpu_s"]["median"], prefix["committed_per_live"]["median"] - 1
            ),
            "default" if row["is_default"] else "",
        )
    console.print(table)


def run(
    shapes: Annotated[str, typer.Option(help="Of tiny, small, nano.")] = "tiny,small",
    runs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and requests.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Step time, waste and sharing by layers a row and page size; see the head of this file."""
    torch.set_num_threads(threads)
    chosen = []
    for name in shapes.split(","):
        if name not in SHAPES:
            raise typer.BadParameter(f"shape is {name!r}; there are {', '.join(SHAPES)}")
        chosen.append(SHAPES[name])
    environments.FOLDER.mkdir(exist_ok=True)
    plan = Plan((), tuple(chosen), WORKLOADS, runs, seed, Limits(threads, 900.0, 1.0))
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for shape in chosen:
            rows += measure(shape, plan, runs, progress)
    print_table(rows, Console())
    packages = ("vmalloc", "torch", "transformers", "numpy")
    settings = {"num_runs": runs, "threads": threads}
    write_json(json, {"provenance": provenance(seed, packages), "settings": settings, "rows": rows})


if __name__ == "__main__":
    typer.run(run)

"""Where the time of a step goes on the CPU, beside the least that it can be.

Serves one workload of ``benchmarks/peers.py`` and clocks the parts of every step on the engine's
thread. Then two floors are measured on the very same row counts, step by step:

- *products*: the matrix products of all layers and the head alone, by our kernel and by torch's
  ``F.linear``, each weight as it is (a step reads all of them from memory again);
- *weights*: all weights read once a step at the rate at which torch adds up a tensor of their size.

Owns: nothing.  Thread-safety: one run at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from contest import environments
from contest.offline import open_llm, serve
from contest.plan import WORKLOADS, Plan, make_job
from contest.runs import Limits
from contest.shapes import SHAPES
from contest.workers.measured import Job
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmalloc import _core
from vmalloc.engine import generation, llm_engine
from vmalloc.engine.fused.forward import FusedForward
from vmalloc.measuring.provenance import provenance, spread, write_json

FLOOR_REPEATS = 5


@dataclass
class Clocked:
    """Seconds and calls of each part in one run, and the rows of each forward pass."""

    seconds: Counter[str] = field(default_factory=Counter)
    num_calls: Counter[str] = field(default_factory=Counter)
    rows: list[tuple[int, int]] = field(default_factory=list)  # tokens, and rows with logits

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Clock a function or method wherever it is called by that name."""
        function: Callable[..., Any] = getattr(owner, name)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started
                self.num_calls[part] += 1

        setattr(owner, name, clocked)

    def clear(self) -> None:
        """Begin a new run."""
        self.seconds.clear()
        self.num_calls.clear()
        self.rows.clear()


class ClockedCore:
    """The native decoder, clocked; it cannot be wrapped in place."""

    def __init__(self, core: Any, clocked: Clocked) -> None:
        self._core, self._clocked = core, clocked

    def forward(self, *args: Any) -> None:
        """As the decoder's; arguments 3 and 5 count rows."""
        self._clocked.rows.append((args[3], args[5]))
        started = time.perf_counter()
        self._core.forward(*args)
        self._clocked.seconds["native forward"] += time.perf_counter() - started
        self._clocked.num_calls["native forward"] += 1


class Profiler:
    """One engine with clocks in it."""

    def __init__(self, job: Job, kv_backend: str) -> None:
        self._job = job
        self._llm = open_llm(job, kv_backend=kv_backend, fused="on")
        serve(self._llm, job, job.warm_up)
        engine, clocked = self._llm.engine, Clocked()
        self.forward_name = engine.forward_name
        forward = engine._runner._forward
        assert isinstance(forward, FusedForward)
        self.spec = forward._decoder.spec
        forward._decoder._core = ClockedCore(forward._decoder._core, clocked)
        clocked.wrap(engine, "step", "step")
        clocked.wrap(engine._scheduler, "schedule", "schedule")
        clocked.wrap(engine._backend, "begin_step", "begin and end of the step")
        clocked.wrap(engine._backend, "end_step", "begin and end of the step")
        clocked.wrap(engine._backend, "batch_view", "batch view")
        clocked.wrap(engine._runner, "forward", "forward")
        clocked.wrap(engine._generation, "advance", "advance")
        clocked.wrap(generation, "sample", "sampling")
        clocked.wrap(llm_engine, "report", "reports")
        self.clocked = clocked

    def run(self) -> dict[str, Any]:
        """One run from a cold prefix cache: tokens per second, and seconds by part."""
        self._llm.engine.flush_prefix_cache()
        self.clocked.clear()
        started, cpu = time.perf_counter(), time.process_time()
        tokens = serve(self._llm, self._job, self._job.requests)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        s = dict(self.clocked.seconds)
        parts = {
            "native forward": s["native forward"],
            "packing of the batch": s["forward"] - s["native forward"] - s["batch view"],
            "batch view": s["batch view"],
            "schedule": s["schedule"],
            "begin and end of the step": s["begin and end of the step"],
            "sampling": s.get("sampling", 0.0),
            "tokens appended": s["advance"] - s.get("sampling", 0.0),
            "reports": s["reports"],
        }
        parts["rest of the step"] = s["step"] - sum(parts.values())
        parts["outside of steps"] = wall_s - s["step"]
        return {
            "wall_s": wall_s,
            "tokens_per_s": tokens / wall_s,
            "tokens_per_cpu_s": tokens / cpu_s,
            "num_steps": self.clocked.num_calls["step"],
            "parts_s": parts,
        }


def floors(profiler: Profiler) -> dict[str, float]:
    """Seconds of a run that products alone take, ours and torch's, and reading the weights."""
    spec = profiler.spec
    weights = [
        projection.weight
        for layer in spec.layers
        for projection in (
            *(layer.query, layer.key, layer.value, layer.output),
            *(layer.gate, layer.up, layer.down),
        )
    ]
    most = max(num_tokens for num_tokens, _ in profiler.clocked.rows)
    x = {
        width: torch.randn(most, width)
        for width in {w.shape[1] for w in (*weights, spec.head.weight)}
    }
    out = torch.empty(most, max(w.shape[0] for w in (*weights, spec.head.weight)))
    counts = Counter(profiler.clocked.rows)
    ours = theirs = 0.0
    for (num_tokens, num_rows), times in track(
        counts.items(), "floors", console=Console(stderr=True)
    ):
        todo = [(w, num_tokens) for w in weights] + [(spec.head.weight, num_rows)]
        own, other = _time_products(todo, x, out)
        ours += own * times
        theirs += other * times
    flat = torch.empty(sum(w.numel() for w in weights) + spec.head.weight.numel()).uniform_()
    read_s = _fastest(lambda: flat.sum())
    return {
        "products, our kernel": ours,
        "products, torch": theirs,
        "weights read once a step": read_s * len(profiler.clocked.rows),
    }


@torch.inference_mode()
def _time_products(
    todo: list[tuple[torch.Tensor, int]], x: dict[int, torch.Tensor], out: torch.Tensor
) -> tuple[float, float]:
    calls = [
        (
            [
                (
                    (x[weight.shape[1]].data_ptr(), weight.shape[1]),
                    (weight.data_ptr(), weight.stride(0), 0, *weight.shape),
                    None,
                    (out.data_ptr(), weight.shape[0]),
                    0,
                    1.0,
                )
            ],
            rows,
        )
        for weight, rows in todo
        if rows > 0
    ]

    def ours() -> None:
        for call, rows in calls:
            _core.linear(call, rows)

    def theirs() -> None:
        for weight, rows in todo:
            if rows > 0:
                F.linear(x[weight.shape[1]][:rows], weight)

    return _fastest(ours), _fastest(theirs)


def _fastest(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls: a floor."""
    times = []
    for _ in range(FLOOR_REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def run(
    shape: Annotated[str, typer.Option(help="tiny, small or nano.")] = "tiny",
    workload: Annotated[str, typer.Option(help="Of peers.py.")] = "offline",
    runs: Annotated[int, typer.Option(min=1, help="Runs; the one of median time is shown.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    kv_backend: Annotated[str, typer.Option(help="virtual or paged.")] = "virtual",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and requests.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Time of a step by part, and its floor; see the head of this file."""
    if shape not in SHAPES or workload not in WORKLOADS:
        raise typer.BadParameter(
            f"shape is {shape!r} and workload {workload!r}; there are {', '.join(SHAPES)} and "
            f"{', '.join(WORKLOADS)}"
        )
    torch.set_num_threads(threads)
    environments.FOLDER.mkdir(exist_ok=True)
    chosen = SHAPES[shape]
    plan = Plan((), (chosen,), (workload,), runs, seed, Limits(threads, 900.0, 1.0))
    profiler = Profiler(make_job(chosen, workload, plan), kv_backend)
    results = sorted((profiler.run() for _ in range(runs)), key=lambda one: one["wall_s"])
    shown, floor = results[len(results) // 2], floors(profiler)
    title = (
        f"{shape} {workload}, {kv_backend}, {threads} threads, {profiler.forward_name}: "
        f"{shown['tokens_per_s']:,.0f} tokens/s, {shown['num_steps']} steps"
    )
    table = Table("part", "ms", "us a step", "share", title=title)
    for name, seconds in (shown["parts_s"] | {f"floor: {k}": v for k, v in floor.items()}).items():
        step_us = f"{seconds / shown['num_steps'] * 1e6:,.0f}"
        table.add_row(name, f"{seconds * 1e3:,.1f}", step_us, f"{seconds / shown['wall_s']:.1%}")
    Console().print(table)
    settings = {
        "shape": shape,
        "workload": workload,
        "kv_backend": kv_backend,
        "threads": threads,
        "num_runs": runs,
        "forward": profiler.forward_name,
    }
    packages = ("vmalloc", "torch", "transformers", "numpy")
    write_json(
        json,
        {
            "provenance": provenance(seed, packages),
            "settings": settings,
            "tokens_per_s": spread([one["tokens_per_s"] for one in results]),
            "median_s": statistics.median(one["wall_s"] for one in results),
            "shown": shown,
            "floor_s": floor,
        },
    )


if __name__ == "__main__":
    typer.run(run)

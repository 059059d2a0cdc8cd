"""Hugging Face generate: a decode step and the most memory, by cache, attention and malloc.

A small Llama (4 layers, 4 query and 2 KV heads of 64, float32) decodes after 512, 2,048 and 8,192
tokens, 1 and 8 rows at a time, over transformers' DynamicCache and StaticCache and over our
VirtualCache, with torch's SDPA and with our CPU kernel. DynamicCache copies all keys and values in
every step into fresh memory, and glibc's malloc by default maps and unmaps that memory each time;
so it also runs with a malloc that keeps what it has (``malloc: tuned``), and that row is the one to
compare with. Contenders are processes of their own and take turns, a few steps each.

Memory is the process's most resident memory above what it had before the cache was filled: it
includes the copies that a step makes, and excludes the model.

Owns: nothing.  Thread-safety: one process; the contenders run one after another.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vmalloc.measuring.provenance import ROOT, provenance, spread, write_json

LENGTHS = (512, 2048, 8192)
BATCHES = (1, 8)
STEPS = 8
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Contender:
    """``cache``: dynamic, static, virtual or interleaved (all layers in one row)."""

    cache: str
    attention: str
    malloc: str = "default"

    @property
    def name(self) -> str:
        return f"{self.cache}, {self.attention}" + (
            ", malloc tuned" if self.malloc == "tuned" else ""
        )


CONTENDERS = (
    Contender("dynamic", "sdpa"),
    Contender("dynamic", "sdpa", "tuned"),
    Contender("dynamic", "vmalloc", "tuned"),
    Contender("static", "sdpa"),
    Contender("virtual", "sdpa"),
    Contender("virtual", "sdpa", "tuned"),
    Contender("virtual", "vmalloc"),
    Contender("interleaved", "vmalloc"),
)


class Process:
    """A contender that waits for its turn."""

    def __init__(self, contender: Contender, batch: int, num_tokens: int, seed: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GOMP_SPINCOUNT": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        if contender.malloc == "tuned":
            environment |= TUNED_MALLOC
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "hf_cache_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        setup = {"batch": batch, "num_tokens": num_tokens, "steps": STEPS, "seed": seed}
        self.ask({**asdict(contender), **setup})

    def ask(self, command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender ended with {self._process.wait()}; see above")
        return json.loads(answer)

    def take_turn(self, *, is_warm_up: bool) -> None:
        times = self.ask("run")
        if not is_warm_up:
            self.wall_ms += times["wall_ms"]
            self.cpu_ms += times["cpu_ms"]

    def close(self) -> None:
        self._process.communicate()


def measure_case(
    batch: int,
    num_tokens: int,
    rounds: int,
    seed: int,
    tick: Callable[[], None],
    contenders: tuple[Contender, ...] = CONTENDERS,
) -> list[dict[str, Any]]:
    """All contenders on one length and batch."""
    shuffler = random.Random(seed)
    processes = {contender: Process(contender, batch, num_tokens, seed) for contender in contenders}
    try:
        for number in range(rounds + 1):
            for contender in shuffler.sample(contenders, len(contenders)):
                processes[contender].take_turn(is_warm_up=number == 0)
            tick()
        return [
            {
                "batch": batch,
                "num_tokens": num_tokens,
                "name": contender.name,
                **asdict(contender),
                "wall_ms": spread(process.wall_ms),
                "cpu_ms": spread(process.cpu_ms),
                "num_steps": len(process.wall_ms),
                **process.ask("memory"),
            }
            for contender, process in processes.items()
        ]
    finally:
        for process in processes.values():
            process.close()


def print_tables(rows: list[dict[str, Any]]) -> None:
    console = Console()
    for batch, num_tokens in sorted({(row["batch"], row["num_tokens"]) for row in rows}):
        table = Table("cache, attention", "step ms", "CPU ms", "peak MiB", "of that tokens")
        table.title = f"batch {batch}, {num_tokens:,} tokens"
        for row in rows:
            if (row["batch"], row["num_tokens"]) == (batch, num_tokens):
                table.add_row(
                    row["name"],
                    _cell(row["wall_ms"]),
                    _cell(row["cpu_ms"]),
                    f"{row['peak_bytes'] / 2**20:.1f}",
                    f"{row['kv_bytes'] / 2**20:.1f}",
                )
        console.print(table)
    console.print("Median (lowest..highest).", style="dim")


def _cell(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars by contender: step time above, memory below, one column per length and batch."""
    from vmalloc.measuring.figures import new_panels, save_figure

    cases = sorted({(row["batch"], row["num_tokens"]) for row in rows})
    colors = {
        "dynamic": "#d4813a",
        "static": "#8c959f",
        "virtual": "#2f81f7",
        "interleaved": "#9ecbff",
    }
    figure, axes = new_panels(2, len(cases), width=2.4 * len(cases), height=5.6)
    for column, case in enumerate(cases):
        chosen = [row for row in rows if (row["batch"], row["num_tokens"]) == case]
        names = [row["name"] for row in chosen]
        shades = [colors[row["cache"]] for row in chosen]
        step, memory = axes[column], axes[len(cases) + column]
        medians = [row["wall_ms"]["median"] for row in chosen]
        reach = [
            [mid - row["wall_ms"]["min"] for mid, row in zip(medians, chosen, strict=True)],
            [0.0] * len(chosen),  # the highest is another program's turn, not the cache's
        ]
        step.barh(names, medians, color=shades, xerr=reach, error_kw={"elinewidth": 0.8})
        step.set_title(f"batch {case[0]}, {case[1]:,} tokens")
        step.set_xlabel("step, ms")
        memory.barh(names, [row["peak_bytes"] / 2**20 for row in chosen], color=shades)
        memory.axvline(chosen[0]["kv_bytes"] / 2**20, color="#57606a", linewidth=0.8)
        memory.set_xlabel("most memory, MiB")
        for axis in (step, memory):
            axis.invert_yaxis()
            if column > 0:
                axis.set_yticklabels([])
    figure.suptitle(
        "Median step, with a line to the lowest; most memory, with a line at the tokens' bytes",
        fontsize=9,
    )
    save_figure(figure, path)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the figure here (needs matplotlib).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 8,
    quick: Annotated[bool, typer.Option(help="Short rows, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds weights and turns.")] = 0,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: show this result of an earlier run.")
    ] = None,
) -> None:
    """Compare caches under transformers' generate; see the head of this file."""
    if redraw is not None:
        show(json.loads(redraw.read_text()), figure)
        return
    lengths, rounds = ((512,), 2) if quick else (LENGTHS, rounds)
    cases = [(batch, num_tokens) for batch in BATCHES for num_tokens in lengths]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("turns", total=len(cases) * (rounds + 1))
        for batch, num_tokens in cases:
            rows += measure_case(batch, num_tokens, rounds, seed, lambda: progress.advance(task))
    packages = ("vmalloc", "torch", "transformers")
    result = {"provenance": provenance(seed, packages), "rows": rows}
    write_json(json_file, result)
    show(result, figure)


def show(result: dict[str, Any], figure: Path | None) -> None:
    """Print a result, and write its figure where it is wanted."""
    print_tables(result["rows"])
    if figure is not None:
        draw_figure(result["rows"], figure)


if __name__ == "__main__":
    typer.run(main)

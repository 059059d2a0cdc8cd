"""The same model and requests through what a user would pick instead, side by side on this machine.

Llamas with random weights in float32, seeded requests of token ids that ignore the end token, two
threads. Every run is a process of its own that starts, warms up on other tokens and serves one
workload from cold caches; peers take turns in shuffled order, round by round, and the result is
written after every round. A run during which other programs used more than ``--max-foreign-cores``
is repeated once, and left out of the medians where a quiet one exists.

- ``offline``: chat-like lengths, all at once.  ``prefix``: 512 shared tokens and 32 of their own.
  ``parallel``: 4 samples of each prompt.
- Before that, every peer decodes 8 requests greedily; tokens are compared with ``generate``'s,
  which takes them one by one. A peer that fails there is left out with its reason.

Owns: nothing.  Thread-safety: one process at a time runs a model.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from contest.environments import Environments
from contest.peers import DEFAULT_PEERS, PEERS
from contest.plan import WORKLOADS, Plan
from contest.report import draw_figure, markdown, print_tables
from contest.runs import Limits
from contest.shapes import SHAPES
from contest.summary import ratios, summarize
from contest.turns import Contest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vmalloc.measuring.provenance import provenance, write_json

FILE_WIDTH = 160


def choose(kind: str, names: str, known: Any) -> tuple[Any, ...]:
    """What a comma-separated list names. Raises ``typer.BadParameter`` naming what is unknown."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise typer.BadParameter(
            f"{kind} {', '.join(unknown) or 'is empty'}; known: {', '.join(known)}"
        )
    return tuple(known[name] if isinstance(known, dict) else name for name in chosen)


def parse_venvs(values: list[str]) -> dict[str, Path]:
    """``NAME=PATH`` of each environment that exists already."""
    found = {}
    known = sorted({peer.environment for peer in PEERS.values() if not peer.is_ours})
    for value in values:
        name, _, path = value.partition("=")
        if name not in known:
            raise typer.BadParameter(f"--venv {value}; known names: {', '.join(known)}")
        if not (Path(path) / "bin" / "python").exists():
            raise typer.BadParameter(f"--venv {value}: there is no bin/python below {path!r}")
        found[name] = Path(path).absolute()
    return found


def main(
    peers: Annotated[str, typer.Option(help=f"Of {', '.join(PEERS)}.")] = ",".join(DEFAULT_PEERS),
    shapes: Annotated[str, typer.Option(help="Of tiny, small, nano.")] = "tiny,small",
    workloads: Annotated[str, typer.Option(help="Of these.")] = ",".join(WORKLOADS),
    runs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every peer.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the figure here (needs matplotlib).")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Write the tables here, as Markdown.")] = None,
    quick: Annotated[bool, typer.Option(help="A toy model once, to see that it runs.")] = False,
    venv: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: an environment to use as it is.")
    ] = None,
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's server, if it is not on PATH.")
    ] = None,
    build_llama_cpp: Annotated[
        bool, typer.Option("--build-llama-cpp", help="Build it if there is none: 15 minutes.")
    ] = False,
    max_foreign_cores: Annotated[
        float, typer.Option(help="CPU use of other programs above which a run is noisy.")
    ] = 0.15,
    timeout: Annotated[float, typer.Option(help="Seconds that a run may take.")] = 900.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, requests and turns.")] = 0,
    redraw: Annotated[
        Path | None, typer.Option(help="Run nothing: show this result of an earlier run.")
    ] = None,
) -> None:
    """Compare with other engines; see the head of this file."""
    if redraw is not None:
        show(json.loads(redraw.read_text()), figure, table)
        return
    if quick:
        shapes, runs = "nano", 1
    plan = Plan(
        peers=choose("--peers", peers, PEERS),
        shapes=choose("--shapes", shapes, SHAPES),
        workloads=choose("--workloads", workloads, WORKLOADS),
        num_runs=runs,
        seed=seed,
        limits=Limits(threads, timeout, max_foreign_cores),
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # A bar that is drawn often takes CPU from what is measured.
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=1) as progress:
        environments = Environments(
            parse_venvs(venv or []), llama_server, build_llama_cpp, progress.console.print
        )
        contest = Contest(plan, environments, progress)
        for _ in contest.rounds():
            write_json(json_file, describe(contest))
    result = describe(contest)
    write_json(json_file, result)
    show(result, figure, table)


def describe(contest: Contest) -> dict[str, Any]:
    """All that is known so far, for the result file."""
    return {
        "provenance": provenance(contest.plan.seed, ("vmalloc", "torch", "transformers")),
        "settings": contest.plan.describe(),
        "rows": summarize(contest.runs),
        "ratios": [asdict(ratio) for ratio in ratios(contest.runs)],
        "greedy_check": contest.checks,
        "left_out": contest.failures,
        "runs": contest.runs,
    }


def show(result: dict[str, Any], figure: Path | None, table: Path | None) -> None:
    """Print a result, and write its figure and its table where they are wanted."""
    output = Console()
    if not output.is_terminal:
        output = Console(width=FILE_WIDTH)
    print_tables(output, result)
    if table is not None:
        table.write_text(markdown(result["rows"]))
    if figure is not None and result["rows"]:
        draw_figure(result["rows"], figure)


if __name__ == "__main__":
    # What ends this process must end the one that it waits for, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    typer.run(main)

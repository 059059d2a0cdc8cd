"""What tensor parallelism costs a step: the plan, the vote, and waiting for the slowest rank.

Serves the same seeded requests over one rank and over several, in turns, and takes the time of
every step apart:

- *plan*: rank 0 writes down what it did to its cache and hands it over, one message a step;
- *vote*: it waits for the others to have done the same, so for the slowest of them;
- *lag*: how much later than rank 0 the slowest rank ended the computations of the step before;
- *rest*: scheduling, computing with the sums over ranks in every layer, and sampling.

On a CPU whose cores one rank has to itself already, several ranks are no gain: what this shows is
what planning together costs. One rank is measured with the model's own forward pass too, which is
what every rank of several runs.

    python benchmarks/tp.py
    python benchmarks/tp.py --model PATH --ranks 4 --json tp.json

Owns: nothing.  Thread-safety: one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

from vmalloc.engine import LLM, SamplingParams
from vmalloc.measuring.provenance import provenance, spread, write_json

BACKENDS = ("virtual", "paged")
PARTS = ("plan", "vote", "lag", "rest")
WARM_UP_STEPS = 5
VOCAB_SIZE = 256
"""Of the prompts: every model has as many tokens."""


@dataclass
class Steps:
    """One run: seconds of each step and of its parts, and what travelled.

    Attributes:
        seconds: of each step.
        parts: by name, of each step.
        num_bytes: of each step's message.
        tokens_per_s: output tokens over the whole run.
        num_grants: rounds in which pages were granted.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    num_bytes: list[int] = field(default_factory=list)
    tokens_per_s: float = 0.0
    num_grants: int = 0


def make_requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Ragged prompts of random tokens, and as ragged lengths to write."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(8, 120))],
            SamplingParams(
                temperature=0.0, max_tokens=rng.randint(16, 96), ignore_eos=True, detokenize=False
            ),
        )
        for _ in range(count)
    ]


def run(llm: LLM, requests: Sequence[tuple[list[int], SamplingParams]]) -> Steps:
    """Serve all requests from an empty prefix cache, step by step."""
    engine, steps = llm.engine, Steps()
    engine.flush_prefix_cache()
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(str(number), prompt, params)
    times = None if engine.leader is None else engine.leader.times
    num_grants = 0 if times is None else times.num_grants
    num_tokens, started = 0, time.perf_counter()
    while engine.has_unfinished_requests():
        before = None if times is None else (times.send_s, times.wait_s, times.lag_s)
        num_bytes = 0 if times is None else times.num_bytes
        step_started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - step_started
        num_tokens += sum(
            len(one.token_ids) for output in outputs if output.is_finished for one in output.outputs
        )
        steps.seconds.append(seconds)
        if times is not None and before is not None:
            after = (times.send_s, times.wait_s, times.lag_s)
            spent = [late - early for late, early in zip(after, before, strict=True)]
            for name, part in zip(PARTS, [*spent, seconds - spent[0] - spent[1]], strict=True):
                steps.parts[name].append(part)
            steps.num_bytes.append(times.num_bytes - num_bytes)
            steps.num_grants = times.num_grants - num_grants
    steps.tokens_per_s = num_tokens / (time.perf_counter() - started)
    return steps


def summary(runs: list[Steps]) -> dict[str, Any]:
    """Medians over the steps of all runs, and the range of the runs' own medians."""
    result: dict[str, Any] = {
        "num_steps": len(runs[0].seconds),
        "step_us": spread([_median_us(one.seconds) for one in runs]),
        "tokens_per_s": spread([one.tokens_per_s for one in runs]),
    }
    if runs[0].num_bytes:
        result["parts_us"] = {
            name: spread([_median_us(one.parts[name]) for one in runs]) for name in PARTS
        }
        result["p99_us"] = {
            name: spread([_p99_us(one.parts[name]) for one in runs]) for name in PARTS
        }
        result["message_bytes"] = spread([statistics.median(one.num_bytes) for one in runs])
        result["num_grants"] = runs[0].num_grants
    return result


def _median_us(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[WARM_UP_STEPS:]) * 1e6


def _p99_us(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds[WARM_UP_STEPS:], n=100)[98] * 1e6


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table that a person reads."""
    table = Table(title="Median microseconds of a step (and the range of the runs' medians)")
    table.add_column("ranks, backend, forward pass")
    for name in ("step", *PARTS, "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        parts = row.get("parts_us")
        medians = [f"{parts[name]['median']:,.0f}" if parts else "-" for name in PARTS]
        table.add_row(
            f"{row['ranks']} {row['backend']} {row['forward']}",
            _cell(row["step_us"]),
            *medians,
            f"{row['tokens_per_s']['median']:,.0f}",
        )
    console.print(table)
    for row in rows:
        if "p99_us" in row:
            plan, vote = (row["p99_us"][name]["median"] for name in ("plan", "vote"))
            console.print(
                f"{row['backend']}, {row['ranks']} ranks: plan and vote are "
                f"{row['share']:.1%} of a step; 99th percentiles {plan:,.0f} and {vote:,.0f} us; "
                f"messages of {row['message_bytes']['median']:,.0f} bytes; pages were granted "
                f"{row['num_grants']} times in {row['num_steps']} steps"
            )


def _cell(values: dict[str, float]) -> str:
    return f"{values['median']:,.0f} ({values['min']:,.0f}..{values['max']:,.0f})"


def draw_figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Where a step's time goes, backend by backend."""
    from vmalloc.measuring.figures import new_panels, save_figure

    ranked = [row for row in rows if "parts_us" in row]
    figure, (axes,) = new_panels(1, 1, width=7.0, height=0.9 + 0.45 * len(ranked))
    labels = [f"{row['backend']}, {row['ranks']} ranks" for row in ranked]
    left = [0.0] * len(ranked)
    for name, colour in (("plan", "#2f81f7"), ("vote", "#d4813a"), ("rest", "#d0d7de")):
        widths = [row["parts_us"][name]["median"] / 1000 for row in ranked]
        axes.barh(labels, widths, left=left, color=colour, label=name, height=0.55)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("median milliseconds of a step")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_figure(figure, file)


@dataclass(frozen=True)
class Setting:
    """What is measured: how many ranks, whose forward pass, which backend."""

    ranks: int
    fused: str
    backend: str


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, or demo.")] = "demo",
    ranks: Annotated[int, typer.Option(help="Ranks to compare with one.", min=2)] = 2,
    requests: Annotated[int, typer.Option(help="Requests a run.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each setting.", min=1)] = 5,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the parts of a step here.")] = None,
) -> None:
    """Time the parts of a step over several ranks; see the head of this file."""
    logging.disable_progress_bar()
    settings = [Setting(1, fused, backend) for backend in BACKENDS for fused in ("auto", "off")]
    settings += [Setting(ranks, "off", backend) for backend in BACKENDS]
    runs: dict[Setting, list[Steps]] = {setting: [] for setting in settings}
    forward: dict[Setting, str] = {}
    # One engine at a time, each setting in every round, so that a busy machine is so for all.
    rounds = [(number, setting) for number in range(repeats) for setting in settings]
    for _, setting in track(rounds, "Measuring", console=Console(stderr=True)):
        num_ranks, fused, backend = astuple(setting)
        with LLM(
            model,
            skip_tokenizer_init=True,
            tensor_parallel_size=num_ranks,
            kv_backend=backend,
            fused=fused,
            max_num_seqs=max_num_seqs,
        ) as llm:
            load = make_requests(requests, seed)
            run(llm, load[: max_num_seqs // 2])  # what is done once: threads, first pages
            runs[setting].append(run(llm, load))
            forward[setting] = llm.engine.forward_name
    rows = []
    for setting, steps in runs.items():
        row = {
            "ranks": setting.ranks,
            "forward": forward[setting],
            "backend": setting.backend,
            **summary(steps),
        }
        if "parts_us" in row:
            parts = row["parts_us"]
            both = parts["plan"]["median"] + parts["vote"]["median"]
            row["share"] = both / row["step_us"]["median"]
        rows.append(row)
    show(rows, Console())
    write_json(
        json_file,
        {
            "provenance": provenance(seed),
            "model": model,
            "requests": requests,
            "repeats": repeats,
            "max_num_seqs": max_num_seqs,
            "rows": rows,
        },
    )
    if figure is not None:
        draw_figure(rows, figure)


if __name__ == "__main__":
    typer.run(main)

"""The same model and requests through what a user would pick instead, side by side on this machine.

Llamas with random weights in float32, seeded requests of token ids that ignore the end token, two
threads. Every run is a process of its own that starts, warms up on other tokens and serves one
workload from cold caches; peers take turns in shuffled order, round by round. A run during which
other programs used more than ``--max-foreign-cores`` is repeated once, and left out of the medians
where a quiet one exists.

- ``offline``: chat-like lengths, all at once.  ``prefix``: 512 shared tokens and 32 of their own.
  ``parallel``: 4 samples of each prompt.
- Before that, every peer decodes 8 requests greedily; tokens are compared with ``generate``'s,
  which takes them one by one. A peer that fails there is left out with its reason.

Owns: nothing.  Thread-safety: one process at a time runs a model.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from contest import environments as env
from contest.environments import Environments, Unavailable
from contest.peers import DEFAULT_PEERS, PEERS, Peer
from contest.report import draw_figure, markdown, print_tables
from contest.runs import Limits, RunFailed, run_peer
from contest.shapes import CONTEXT_TOKENS, SHAPES, Shape, checkpoint
from contest.summary import compare_tokens, ratios, summarize
from contest.workers.measured import Job, Request
from provenance import provenance, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vmalloc.engine.ab.workload import make_workload

WORKLOADS = ("offline", "prefix", "parallel")
KV_BYTES = 1 << 30
BATCHED_TOKENS = 512
NUM_CHECKED = 8
REFERENCE = "hf-generate"
NUM_TRIES = 2
FILE_WIDTH = 160
Run = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    peers: tuple[Peer, ...]
    shapes: tuple[Shape, ...]
    workloads: tuple[str, ...]
    num_runs: int
    seed: int
    limits: Limits

    @property
    def num_turns(self) -> int:
        """Runs of the checks and of the rounds, without repetitions."""
        rounds = len(self.workloads) * self.num_runs
        return len(self.shapes) * len(self.peers) * (1 + rounds)


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

    def run(self) -> None:
        for shape in self.plan.shapes:
            self._check(shape)
            for number in range(self.plan.num_runs):
                for workload in self.plan.workloads:
                    job = make_job(shape, workload, self.plan)
                    for peer in self._shuffler.sample(self.plan.peers, len(self.plan.peers)):
                        self._take_turn(peer, shape, workload, job, number)

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
            place = {"peer": peer.name, "shape": shape.name, "workload": workload}
            self.failures.append({**place, "reason": str(error)})
            self._progress.console.print(f"{peer.name} left out: {error}", markup=False)
            return None
        finally:
            self._progress.advance(self._task)


def _line(peer: Peer, run: Run) -> str:
    noise = "" if run["is_quiet"] else f", {run['foreign_cores']:.2f} foreign cores"
    return f"{peer.name}: {run['tokens_per_s']:,.0f} tokens/s after {run['ready_s']:.1f} s{noise}"


def make_job(shape: Shape, workload: str, plan: Plan) -> Job:
    """The workload's requests within the limits that all peers get; options are the peer's."""
    drawn = make_workload(
        workload,
        vocab_size=shape.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        num_requests=shape.num_requests[workload],
        seed=plan.seed,
        scale=shape.scale,
    )
    requests = [
        Request(list(one.prompt_token_ids), one.num_output_tokens, one.num_completions, one.seed)
        for one in drawn.requests
    ]
    return Job(
        model=str(checkpoint(shape, env.FOLDER / "models", plan.seed)),
        options={},
        threads=plan.limits.threads,
        is_greedy=workload != "parallel",
        seed=plan.seed,
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=shape.max_num_seqs,
        max_batched_tokens=BATCHED_TOKENS,
        kv_bytes=KV_BYTES,
        warm_up=make_warm_up(shape, requests[0].n),
        requests=requests,
    )


def make_check(shape: Shape, plan: Plan) -> Job:
    """The first requests of ``offline``, greedily."""
    job = make_job(shape, "offline", plan)
    return replace(job, requests=job.requests[:NUM_CHECKED])


def make_warm_up(shape: Shape, n: int) -> list[Request]:
    """A few short requests whose prompts begin unlike any of the workload's."""
    rng = random.Random(f"warm-up {shape.name}")
    prompts = [[rng.randrange(1, shape.vocab_size) for _ in range(64)] for _ in range(4)]
    return [Request(prompt, 16, n, seed) for seed, prompt in enumerate(prompts)]


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
) -> None:
    """Compare with other engines; see the head of this file."""
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
        contest.run()
    rows, found = summarize(contest.runs), ratios(contest.runs)
    output = Console()
    if not output.is_terminal:
        output = Console(width=FILE_WIDTH)
    print_tables(output, rows, contest.checks, contest.failures, found)
    write_json(
        json_file,
        {
            "provenance": provenance(seed, ("vmalloc", "torch", "transformers")),
            "settings": describe(plan),
            "rows": rows,
            "ratios": [asdict(ratio) for ratio in found],
            "greedy_check": contest.checks,
            "left_out": contest.failures,
            "runs": contest.runs,
        },
    )
    if table is not None:
        table.write_text(markdown(rows))
    if figure is not None and rows:
        draw_figure(rows, figure)


def describe(plan: Plan) -> dict[str, Any]:
    """What was run, for the result file."""
    return {
        "peers": [peer.name for peer in plan.peers],
        "shapes": {
            shape.name: {**asdict(shape), "num_parameters": shape.num_parameters}
            for shape in plan.shapes
        },
        "workloads": plan.workloads,
        "num_runs": plan.num_runs,
        "limits": asdict(plan.limits),
        "context_tokens": CONTEXT_TOKENS,
        "max_batched_tokens": BATCHED_TOKENS,
        "kv_bytes": KV_BYTES,
    }


if __name__ == "__main__":
    typer.run(main)

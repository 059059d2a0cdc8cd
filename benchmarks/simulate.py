"""A million requests through the real scheduler and allocator, over a simulated device.

What is real: the scheduler, admission, preemption and its cost model, sequence groups, prefix
index, both KV backends with their allocator (the C++ arena over the driver that only counts). What
is simulated: time. A step takes as long as its bytes and products need at the peak of the device (a
roofline, see ``simulation/models.py``), a driver call as long as was published
(``simulation/hardware.py``), and the background worker gets as much done as fits into a step.

    python benchmarks/simulate.py study scale stalls layout sharing --json simulate.json
    python benchmarks/simulate.py study million            # two times two runs of 1,000,000
    python benchmarks/simulate.py replay --trace my.csv    # arrival_s,prompt_tokens,output_tokens

**Nothing here was measured on a GPU.** Not modelled: the host's own time (reported beside it as it
is on this machine), kernel launches, attention kernels that like one layout better than another,
other processes. At its peak a device is as fast as it can be, which is hardest on the allocator.

Steps that differ from the one before by lengths alone are done at once.
``tests/benchmarks/test_simulate.py`` holds every step against the engine over a real model.

Owns: nothing.  Thread-safety: one run at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from simulation.hardware import DEVICES, DriverLatency
from simulation.models import MODELS, Deployment
from simulation.run import run
from simulation.setting import Setting
from simulation.studies import STUDIES, Case
from simulation.tables import print_table
from simulation.trace import LENGTHS, draw_trace, read_trace

from vmalloc.measuring.provenance import ROOT, provenance, write_json

QUICK_SHARE = 0.02
MIN_REQUESTS = 100

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n")[0])
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result here, beside other studies' ones.")
]
Seed = Annotated[int, typer.Option(help="Seeds lengths and arrivals.")]


def run_cases(cases: list[Case], name: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """Every case after the other."""
    for idx, case in enumerate(cases, start=1):
        trace = case.make_trace()
        label = f"{name} {idx}/{len(cases)}"
        task = progress.add_task(label, total=len(trace))
        result = run(case.setting, trace, _tick(progress, task))
        progress.remove_task(task)
        yield {"names": case.names, **result}


def _tick(progress: Progress, task: Any) -> Callable[[int], None]:
    return lambda num_ended: progress.update(task, completed=num_ended)


def _make_progress() -> Progress:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns[:3], MofNCompleteColumn(), columns[3], console=Console(stderr=True))


@app.command()
def study(
    names: Annotated[list[str], typer.Argument(help=f"Which: {', '.join(STUDIES)}.")],
    json_file: JsonFile = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw simulate-NAME.svg into this folder.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Most requests of a run; default: as the study says.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A fiftieth of the requests.")] = False,
    seed: Seed = 0,
) -> None:
    """Answer one question after the other; see simulation/studies.py."""
    for name in names:
        if name not in STUDIES:
            raise typer.BadParameter(f"{name!r} is no study; there are {', '.join(STUDIES)}")

    def scale(count: int) -> int:
        if quick:
            count = max(MIN_REQUESTS, int(count * QUICK_SHARE))
        return count if requests is None else min(count, requests)

    with _make_progress() as progress:
        for name in names:
            origin, rows = provenance(seed), []
            for row in run_cases(STUDIES[name](scale, seed), name, progress):
                rows.append(row)
                if json_file is not None:  # what was run is kept if the next one is broken off
                    _add_to(json_file, name, {"provenance": origin, "rows": rows})
            print_table(name, rows, Console())
            if figures is not None:
                draw(name, rows, figures)


def draw(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """The figure of a study, if it has one."""
    from simulation.plots import PLOTS

    if name in PLOTS:
        PLOTS[name](rows, folder / f"simulate-{name}.svg")


def _add_to(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put one study's result into the file; a run is a line."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_studies({**known, name: result}))


def dump_studies(studies: dict[str, dict[str, Any]]) -> str:
    """The text of a result file."""
    texts = []
    for name, result in studies.items():
        rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
        origin = f'"provenance": {json.dumps(result["provenance"])}'
        texts.append(f' {json.dumps(name)}: {{\n  {origin},\n  "rows": [\n  {rows}]}}')
    return "{\n" + ",\n".join(texts) + "\n}\n"


@app.command()
def plot(
    json_file: Annotated[Path, typer.Argument(help="What `study --json` wrote.")] = (
        ROOT / "benchmarks" / "results" / "simulate.json"
    ),
    figures: Annotated[Path, typer.Option(help="The folder.")] = ROOT / "docs" / "figures",
) -> None:
    """Draw the figures of a result file again."""
    for name, result in json.loads(json_file.read_text()).items():
        draw(name, result["rows"], figures)


@app.command()
def replay(
    trace_file: Annotated[
        Path | None,
        typer.Option("--trace", help="CSV with arrival_s,prompt_tokens,output_tokens."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many; the first ones of a file.")] = (
        1_000_000
    ),
    lengths: Annotated[str, typer.Option(help=f"Drawn ones: {', '.join(LENGTHS)}.")] = "sharegpt",
    rate: Annotated[
        float | None, typer.Option(help="Drawn requests per second; default: all at the start.")
    ] = None,
    shared_tokens: Annotated[int, typer.Option(help="Common start of drawn prompts.")] = 0,
    width: Annotated[int, typer.Option(min=1, help="Sequences of every request.")] = 1,
    backend: Annotated[str, typer.Option(help="virtual or paged.")] = "virtual",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "Llama-3.1-8B",
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "H200",
    num_devices: Annotated[int, typer.Option(min=1, help="Tensor-parallel GPUs.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 10_000,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = 16_384,
    page_bytes: Annotated[int, typer.Option(min=4096)] = 2 << 20,
    layers_per_group: Annotated[int | None, typer.Option(min=1)] = None,
    commit_ahead_tokens: Annotated[int, typer.Option(min=0)] = 4,
    block_size: Annotated[int, typer.Option(min=1)] = 16,
    prefix_caching: Annotated[bool, typer.Option()] = False,
    swap_bytes: Annotated[int, typer.Option(min=0, help="Host memory; 0: recompute.")] = 0,
    create_us: Annotated[float, typer.Option(help="Driver: create a page.")] = 193.0,
    map_us: Annotated[float, typer.Option(help="Driver: map a page.")] = 1.5,
    set_access_us: Annotated[float, typer.Option(help="Driver: grant access to a run.")] = 36.0,
    unmap_us: Annotated[float, typer.Option(help="Driver: unmap a run.")] = 26.0,
    json_file: JsonFile = None,
    seed: Seed = 0,
) -> None:
    """Serve one trace under settings of your own; prints the result as JSON."""
    choices = (("lengths", lengths, LENGTHS), ("model", model, MODELS), ("device", device, DEVICES))
    for name, value, known in (*choices, ("backend", backend, ("virtual", "paged"))):
        if value not in known:
            raise typer.BadParameter(f"{name} is {value!r}; supported: {', '.join(known)}")
    setting = Setting(
        kind=backend,  # type: ignore[arg-type]
        deployment=Deployment(MODELS[model], DEVICES[device], num_devices),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_bytes=page_bytes,
        layers_per_group=layers_per_group,
        commit_ahead_tokens=commit_ahead_tokens,
        block_size=block_size,
        prefix_caching=prefix_caching,
        preemption_mode="auto" if swap_bytes else "recompute",
        swap_bytes=swap_bytes,
        latency=DriverLatency(create_us, map_us, set_access_us, unmap_us),
    )
    if trace_file is not None:
        trace = replace(read_trace(trace_file, requests), width=width)
    else:
        trace = draw_trace(
            LENGTHS[lengths], requests, seed, rate=rate, shared_tokens=shared_tokens, width=width
        )
    with _make_progress() as progress:
        task = progress.add_task("requests", total=len(trace))
        result = run(setting, trace, _tick(progress, task), keeps_points=True)
    if json_file is not None:
        write_json(json_file, {"provenance": provenance(seed), **result})
    Console().print_json(data={name: result[name] for name in result if name != "points"})


if __name__ == "__main__":
    app()

"""Memory saved by sharing: the memory-sharing figure of the PagedAttention paper, both backends.

The paper (Kwon et al., SOSP 2023, figure 15) divides the blocks that sharing saves by the blocks
that would be used without it. The same here, in bytes of ``KVCacheStats`` summed over all steps:

    saved = shared_bytes / (committed_bytes + shared_bytes)

``committed_bytes`` are the pages that hold live rows, ``shared_bytes`` one page for each further
reference to one; their sum is what the sequences would take if each had pages of its own.
``net_saved`` charges the virtual backend for what else its sequences hold: pages ahead of need,
and pages of dropped beams that wait for the kernels of the step. Parked pages are left out, as free
ones are. There is memory to spare, so nobody takes back pages ahead, of which most are what was
left in a warm slot that a shorter sequence adopted. Everything is counted while the step is open
and all of its memory operations are done, which is when a backend holds most.

No model runs. A request is admitted with its prompt and forked in the next step; all its sequences
then grow by a token a step to the request's output length. As many requests are live as make 48
sequences. Beams reorder before every token, as a beam search over made-up scores says: 64 possible
tokens with normal logits of standard deviation ``--sharpness``, drawn anew for each beam and step;
the best ``width`` of all continuations by cumulative log-probability survive. At the default, 4, a
beam of four or six has a surviving child with probability 0.8, as at the bundled demo model, and
the last common ancestor is 10 or 17 tokens back on average (demo model: median 15 and 72).

Owns: nothing.  Thread-safety: one process, no threads of its own.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from workload import (
    ALPACA,
    SHAREGPT,
    ByteSteps,
    Lengths,
    Request,
    describe_trace,
    make_cache,
    make_trace,
)

from vmalloc import SequenceGroupSpec
from vmalloc.backend import KVBackend
from vmalloc.measuring.provenance import provenance, write_json

Method = Literal["parallel", "beam"]

METHODS: tuple[Method, ...] = ("parallel", "beam")
WIDTHS = (2, 4, 6)
BACKENDS = ("paged", "virtual")
NUM_LIVE_SEQS = 48
VOCABULARY = 64
SHARPNESS = 4.0


class Beams:
    """Which beams survive, step by step: a beam search over made-up scores."""

    def __init__(self, width: int, sharpness: float, rng: np.random.Generator) -> None:
        self._width = width
        self._sharpness = sharpness
        self._rng = rng
        self._scores = np.zeros(1)  # one until the prompt's end, from which all continue

    def next_parents(self) -> list[int]:
        """For each beam the one that it continues."""
        logits = self._sharpness * self._rng.standard_normal((len(self._scores), VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        scores = (self._scores[:, None] + logprobs).ravel()
        best = np.argsort(-scores)[: self._width]
        self._scores = scores[best]
        parents: list[int] = (best // VOCABULARY).tolist()
        return parents


@dataclass
class Group:
    """The sequences of one live request; only the first exists until they fork."""

    seq_ids: tuple[int, ...]
    num_tokens: int
    final_tokens: int
    beams: Beams | None
    is_forked: bool = False


def measure(
    kind: str,
    method: Method,
    width: int,
    trace: list[Request],
    *,
    seed: int = 0,
    sharpness: float = SHARPNESS,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Serve ``trace`` with groups of ``width`` sequences; what they shared.

    ``tick`` is called with the number of requests that ended.
    """
    totals = ByteSteps()
    rng = np.random.default_rng([seed, width])
    with make_cache(kind, NUM_LIVE_SEQS) as cache:
        for num_ended in _serve(cache, method, width, trace, sharpness, rng, totals):
            if tick is not None:
                tick(num_ended)
        cache.check_invariants()
        stats = cache.stats()
    unshared = totals.committed + totals.shared  # if each sequence had pages of its own
    held = totals.committed + totals.ahead + totals.retired
    return {
        "backend": kind,
        "method": method,
        "width": width,
        "saved": totals.shared / unshared,
        "net_saved": 1 - held / unshared,
        "saved_of_rows": 1 - totals.live / totals.logical,
        "ahead_share": totals.ahead / unshared,
        "retired_share": totals.retired / unshared,
        "parked_share": totals.parked / unshared,
        "num_steps": totals.num_steps,
        "peak_committed_bytes": stats.peak_committed_bytes,
        "mean_unshared_mib": unshared / totals.num_steps / 2**20,
        "aliased_pages": stats.aliased_pages,
        "cow_copies": stats.cow_copies,
    }


def _serve(
    cache: KVBackend,
    method: Method,
    width: int,
    trace: list[Request],
    sharpness: float,
    rng: np.random.Generator,
    totals: ByteSteps,
) -> Iterator[int]:
    """Continuous batching without a model; yields after each step how many requests ended."""
    fresh_ids = itertools.count()
    waiting, groups = deque(trace), list[Group]()
    while waiting or groups:
        step = cache.begin_step()
        _grow(cache, groups)
        while waiting and len(groups) < NUM_LIVE_SEQS // width:
            request = waiting.popleft()
            beams = Beams(width, sharpness, rng) if method == "beam" else None
            final = request.num_prompt + request.num_output
            seq_ids = tuple(itertools.islice(fresh_ids, width))
            group = Group(seq_ids, request.num_prompt, final, beams)
            groups.append(group)
            spec = SequenceGroupSpec(group.seq_ids[:1], group.num_tokens)
            _require(cache.try_admit(spec) is not None)
        totals.add(cache)
        cache.end_step(step)
        ended = [group for group in groups if group.num_tokens >= group.final_tokens]
        for group in ended:
            cache.free(group.seq_ids)
        groups = [group for group in groups if group.num_tokens < group.final_tokens]
        yield len(ended)


def _grow(cache: KVBackend, groups: list[Group]) -> None:
    """Fork what was computed in the step before, reorder beams, and add a token to all."""
    for group in groups:
        parents = None if group.beams is None else group.beams.next_parents()
        if not group.is_forked:
            _require(cache.try_fork(group.seq_ids[0], group.seq_ids[1:]))
            group.is_forked = True
        elif parents is not None:
            _require(cache.try_reorder(group.seq_ids, parents))
        group.num_tokens += 1
    seq_ids = [seq_id for group in groups for seq_id in group.seq_ids]
    num_tokens = [group.num_tokens for group in groups for _ in group.seq_ids]
    _require(cache.try_extend(seq_ids, num_tokens))


def _require(succeeded: bool) -> None:
    if not succeeded:
        raise RuntimeError("the pool is too small for this benchmark: a bug in it")


def measure_case(
    method: Method, width: int, trace: list[Request], **settings: Any
) -> dict[str, dict[str, Any]]:
    """One method and width with both backends, by name."""
    return {kind: measure(kind, method, width, trace, **settings) for kind in BACKENDS}


def measure_all(
    lengths: Lengths, num_requests: int, seed: int, sharpness: float, progress: Progress
) -> dict[str, Any]:
    """All methods and widths on one trace."""
    trace = make_trace(lengths, num_requests, seed)
    cases = list(itertools.product(METHODS, WIDTHS))
    task = progress.add_task(lengths.name, total=len(BACKENDS) * len(cases) * num_requests)

    def tick(num_ended: int) -> None:
        progress.advance(task, num_ended)

    rows = [
        measure_case(method, width, trace, seed=seed, sharpness=sharpness, tick=tick)
        for method, width in cases
    ]
    return {"trace": describe_trace(lengths, trace), "rows": rows}


def print_tables(result: dict[str, Any]) -> None:
    console = Console()
    for part in result["traces"]:
        table = Table("", "width", "paged", "virtual", "ratio", "net", "ratio", "ahead", "retired")
        table.title = f"Memory saved by sharing, {part['trace']['name']} lengths"
        for row in part["rows"]:
            paged, virtual = row["paged"], row["virtual"]
            table.add_row(
                virtual["method"],
                str(virtual["width"]),
                f"{paged['saved']:.1%}",
                f"{virtual['saved']:.1%}",
                f"{virtual['saved'] / paged['saved']:.2f}",
                f"{virtual['net_saved']:.1%}",
                f"{virtual['net_saved'] / paged['saved']:.2f}",
                f"{virtual['ahead_share']:.1%}",
                f"{virtual['retired_share']:.1%}",
            )
        console.print(table)
    console.print(
        "net: virtual, with pages ahead and retired counted as used; ratio: over paged.",
        style="dim",
    )


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Bars as in the paper: one panel per trace and method, bars by width."""
    from vmalloc.measuring.figures import COLORS, new_panels, save_figure

    panels = list(itertools.product(result["traces"], METHODS))
    titles = {"parallel": "parallel sampling", "beam": "beam search"}
    figure, axes = new_panels(1, len(panels), width=9.6, height=3.2, sharey=True)
    bars_of = {
        "paged": ("paged", "saved"),
        "virtual": ("virtual", "saved"),
        "virtual, net": ("virtual", "net_saved"),
    }
    for axis, (part, method) in zip(axes, panels, strict=True):
        rows = [row for row in part["rows"] if row["paged"]["method"] == method]
        for place, (label, (backend, key)) in enumerate(bars_of.items()):
            values = [100 * row[backend][key] for row in rows]
            places = [idx + 0.28 * (place - 1) for idx in range(len(rows))]
            bars = axis.bar(places, values, 0.26, color=COLORS[label], label=label)
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        axis.set_title(f"{part['trace']['name']}\n{titles[method]}")
        axis.set_xticks(range(len(rows)), [str(row["paged"]["width"]) for row in rows])
        axis.set_xlabel("sequences per request" if method == "parallel" else "beam width")
    axes[0].set_ylabel("memory saved, %")
    lowest = min(row["virtual"]["net_saved"] for part in result["traces"] for row in part["rows"])
    axes[0].set_ylim(min(0.0, 100 * lowest - 6), 100)
    axes[0].legend(loc="upper left")
    save_figure(figure, path)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the figure here (needs matplotlib).")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of each trace.")] = 200,
    sharpness: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of the made-up beam logits.")
    ] = SHARPNESS,
    quick: Annotated[bool, typer.Option(help="24 requests, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds lengths and scores.")] = 0,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: show this result of an earlier run.")
    ] = None,
) -> None:
    """Measure the memory that sharing saves; see the head of this file."""
    if redraw is not None:
        show(json.loads(redraw.read_text()), figure)
        return
    num_requests = 24 if quick else num_requests
    result: dict[str, Any] = {"provenance": provenance(seed), "sharpness": sharpness}
    with Progress(console=Console(stderr=True)) as progress:
        result["traces"] = [
            measure_all(lengths, num_requests, seed, sharpness, progress)
            for lengths in (ALPACA, SHAREGPT)
        ]
    write_json(json_file, result)
    show(result, figure)


def show(result: dict[str, Any], figure: Path | None) -> None:
    """Print a result, and write its figure where it is wanted."""
    print_tables(result)
    if figure is not None:
        draw_figure(result, figure)


if __name__ == "__main__":
    typer.run(main)

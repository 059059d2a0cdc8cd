"""How much committed KV memory holds tokens: the memory-waste figure of the PagedAttention paper.

Five ways to commit memory serve the same requests under the same cap (Kwon et al., SOSP 2023,
figure 2): ``max_length``, ``power_of_two`` and ``oracle`` are the paper's contiguous rivals (Orca
Max, Pow2, Oracle) as commit policies of the virtual backend; ``paged`` and ``virtual`` take memory
as tokens come. In bytes, summed over all steps while requests wait:

- ``token_states``: share of committed memory that holds live rows (the figure's number);
- ``reserved``: share that the sequences will fill before they end;
- ``never_filled``: the rest;
- ``with_ahead``, ``with_parked``: live rows over committed memory and what is ahead, and over all
  that and parked pages. Both are free for the taking, but not free;
- ``mean_live_seqs``: how many sequences fitted at once.

Over virtual addresses even the contiguous policies have no external fragmentation, which took
another part of memory from the paper's rivals: they do better here than there.

No model runs. Requests are admitted in order while there is room, and grow by a token a step. Where
the pool runs out, the sequence that was admitted last is dropped and comes back first, to be
admitted at the length it had (preemption by recompute). Under the cap about 50 sequences fit where
memory is taken as needed. One more run gives the virtual backend four times that for 48 sequences:
nobody then takes back what is ahead or parked, and it shows at its largest.

Owns: nothing.  Thread-safety: one process, no threads of its own.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from workload import (
    ALPACA,
    MAX_SEQ_LEN,
    PAGE_BYTES,
    ROW_BYTES,
    SHAREGPT,
    TOKENS_PER_PAGE,
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
from vmalloc.reservation import reserved_tokens

MAX_NUM_SEQS = 128  # never reached
CAPACITY_PAGES = {SHAREGPT: 1536, ALPACA: 256}  # 96 and 16 MiB
# With memory to spare: a cap so many times as large, and this many sequences at most.
SPARE, SPARE_NUM_SEQS = 4, 48

POLICIES = {
    "max_length": {"kind": "virtual", "commit_policy": "max_length"},
    "power_of_two": {"kind": "virtual", "commit_policy": "power_of_two"},
    "oracle": {"kind": "virtual", "commit_policy": "oracle"},
    "paged": {"kind": "paged"},
    "virtual": {"kind": "virtual"},
}


@dataclass
class Sequence:
    """A request in the queue or in the cache."""

    seq_id: int
    num_prompt: int
    num_tokens: int
    final_tokens: int

    def spec(self) -> SequenceGroupSpec:
        return SequenceGroupSpec(
            (self.seq_id,),
            self.num_tokens,
            prompt_tokens=self.num_prompt,
            final_tokens=self.final_tokens,
        )


class Server:
    """Continuous batching without a model, over one cache."""

    def __init__(self, cache: KVBackend, trace: list[Request]) -> None:
        self.cache = cache
        self.waiting = deque(
            Sequence(seq_id, request.num_prompt, request.num_prompt, sum_tokens(request))
            for seq_id, request in enumerate(trace)
        )
        self.running: list[Sequence] = []
        self.totals = ByteSteps()
        self.reserved = 0  # bytes that are committed, empty and needed later, summed over steps
        self.seq_steps = 0
        self.peak_seqs = 0
        self.num_preemptions = 0

    def step(self) -> None:
        """Make room for a token of every sequence, admit, and count."""
        num_preemptions = self.num_preemptions
        while not self._try_grow():
            self._preempt()
        if self.num_preemptions == num_preemptions:
            self._admit()
        step = self.cache.begin_step()
        self._count()
        self.cache.end_step(step)
        ended = [seq for seq in self.running if seq.num_tokens >= seq.final_tokens]
        self.cache.free([seq.seq_id for seq in ended])
        self.running = [seq for seq in self.running if seq.num_tokens < seq.final_tokens]

    def _try_grow(self) -> bool:
        seq_ids = [seq.seq_id for seq in self.running]
        if not self.cache.try_extend(seq_ids, [seq.num_tokens + 1 for seq in self.running]):
            return False
        for seq in self.running:
            seq.num_tokens += 1
        return True

    def _preempt(self) -> None:
        victim = self.running.pop()
        self.cache.free([victim.seq_id])
        self.waiting.appendleft(victim)
        self.num_preemptions += 1

    def _admit(self) -> None:
        while self.waiting and self.cache.try_admit(self.waiting[0].spec()) is not None:
            self.running.append(self.waiting.popleft())

    def _count(self) -> None:
        self.totals.add(self.cache)
        self.reserved += sum(self._to_be_filled(seq) for seq in self.running) * ROW_BYTES
        self.seq_steps += len(self.running)
        self.peak_seqs = max(self.peak_seqs, len(self.running))

    def _to_be_filled(self, seq: Sequence) -> int:
        """Rows of a sequence that are committed, empty, and needed before it ends."""
        num_rows = max(seq.num_tokens, reserved_tokens(self.cache.config, seq.spec()))
        num_committed = -(-num_rows // TOKENS_PER_PAGE) * TOKENS_PER_PAGE
        return min(num_committed, seq.final_tokens) - seq.num_tokens


def sum_tokens(request: Request) -> int:
    """Tokens of a request when it ends."""
    return min(request.num_prompt + request.num_output, MAX_SEQ_LEN)


def measure(
    policy: str,
    trace: list[Request],
    capacity_pages: int,
    max_num_seqs: int = MAX_NUM_SEQS,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Serve ``trace`` under one policy until nothing waits; shares of memory over those steps.

    ``tick`` is called with the number of requests that left the queue, negative if some came back.
    """
    with make_cache(
        max_num_seqs=max_num_seqs, capacity_bytes=capacity_pages * PAGE_BYTES, **POLICIES[policy]
    ) as cache:
        server = Server(cache, trace)
        while server.waiting:
            num_waiting = len(server.waiting)
            server.step()
            if tick is not None:
                tick(num_waiting - len(server.waiting))
        cache.check_invariants()
        stats = cache.stats()
    totals = server.totals
    token_states = totals.live / totals.committed
    reserved = server.reserved / totals.committed
    with_ahead = totals.committed + totals.ahead
    return {
        "policy": policy,
        "capacity_pages": capacity_pages,
        "max_num_seqs": max_num_seqs,
        "token_states": token_states,
        "reserved": reserved,
        "never_filled": 1 - token_states - reserved,
        "with_ahead": totals.live / with_ahead,
        "with_parked": totals.live / (with_ahead + totals.parked),
        "ahead_share": totals.ahead / totals.committed,
        "parked_share": totals.parked / totals.committed,
        "mean_live_seqs": server.seq_steps / totals.num_steps,
        "peak_live_seqs": server.peak_seqs,
        "num_preemptions": server.num_preemptions,
        "num_steps": totals.num_steps,
        "created_pages": stats.created_pages,
        "adopted_pages": stats.adopted_pages,
        "reclaimed_pages": stats.reclaimed_pages,
    }


def measure_all(
    lengths: Lengths, num_requests: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """All policies on one trace under the cap, and the virtual backend with memory to spare."""
    trace = make_trace(lengths, num_requests, seed)
    task = progress.add_task(lengths.name, total=(len(POLICIES) + 1) * num_requests)

    def tick(num_taken: int) -> None:
        progress.advance(task, num_taken)

    pages = CAPACITY_PAGES[lengths]
    return {
        "trace": describe_trace(lengths, trace),
        "capacity_bytes": pages * PAGE_BYTES,
        "rows": [measure(policy, trace, pages, tick=tick) for policy in POLICIES],
        "spare": measure("virtual", trace, SPARE * pages, SPARE_NUM_SEQS, tick=tick),
    }


def print_tables(result: dict[str, Any]) -> None:
    console = Console()
    for part in result["traces"]:
        table = Table("", "tokens", "later", "never", "+ahead", "+parked", "live", "preempted")
        table.columns[0].no_wrap = True
        table.title = (
            f"Committed KV memory, {part['trace']['name']} lengths, "
            f"{part['capacity_bytes'] >> 20} MiB"
        )
        for row in [*part["rows"], part["spare"]]:
            table.add_row(
                row["policy"] if row is not part["spare"] else "virtual, roomy",
                f"{row['token_states']:.1%}",
                f"{row['reserved']:.1%}",
                f"{row['never_filled']:.1%}",
                f"{row['with_ahead']:.1%}",
                f"{row['with_parked']:.1%}",
                f"{row['mean_live_seqs']:.1f}",
                str(row["num_preemptions"]),
            )
        console.print(table)
    console.print(
        "tokens: in live rows; later: filled before the end; +ahead, +parked: tokens where that "
        "memory counts as committed too; live: sequences.",
        style="dim",
    )


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Stacked bars as in the paper, one panel per trace."""
    from vmalloc.measuring.figures import COLORS, new_panels, save_figure

    parts = {
        "token states": "token_states",
        "reserved, filled later": "reserved",
        "never filled": "never_filled",
    }
    figure, axes = new_panels(1, len(result["traces"]), width=9.0, height=3.4, sharey=True)
    for axis, part in zip(axes, result["traces"], strict=True):
        rows = part["rows"]
        names = [f"{row['policy']}\n{row['mean_live_seqs']:.0f} live" for row in rows]
        bottoms = [0.0] * len(rows)
        for label, key in parts.items():
            values = [100 * row[key] for row in rows]
            bars = axis.bar(names, values, 0.7, bottom=bottoms, color=COLORS[label], label=label)
            texts = [f"{value:.1f}" if value >= 6 else "" for value in values]
            color = "white" if label == "token states" else "#24292f"
            axis.bar_label(bars, texts, label_type="center", fontsize=7, color=color)
            bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
        axis.set_title(
            f"{part['trace']['name']} lengths, cap {part['capacity_bytes'] >> 20} MiB", pad=8
        )
        axis.tick_params(axis="x", labelsize=7.5, length=0)
    axes[0].set_ylabel("committed KV memory, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the figure here (needs matplotlib).")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of each trace.")] = 500,
    quick: Annotated[bool, typer.Option(help="100 requests, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds the lengths.")] = 0,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: show this result of an earlier run.")
    ] = None,
) -> None:
    """Measure how much committed memory holds tokens; see the head of this file."""
    if redraw is not None:
        show(json.loads(redraw.read_text()), figure)
        return
    num_requests = 100 if quick else num_requests
    result: dict[str, Any] = {"provenance": provenance(seed)}
    with Progress(console=Console(stderr=True)) as progress:
        result["traces"] = [
            measure_all(lengths, num_requests, seed, progress) for lengths in (ALPACA, SHAREGPT)
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

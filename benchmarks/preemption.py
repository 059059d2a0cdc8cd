"""Swap against recompute, by page size and by block size: what a preempted sequence costs.

The PagedAttention paper (Kwon et al., SOSP 2023, figure 19) measures both for several block sizes.
The same here with the real engine on CPU, one torch thread, one sequence, prefix caching off:

- ``swap_out``, ``swap_in``: the backend's copy to host memory and back, page mapping included;
- ``recompute``: from the scheduler's preemption until the sequence has its next token, by way of
  dropping its KV, waiting, admission and prefill, less a decode step, which a swapped-in sequence
  still has to do;
- ``auto``: what an engine with ``preemption_mode="auto"`` picked, at its first preemption and after
  it had measured some.

Times are CPU times of the engine's thread, which does all of this and never waits: on a quiet
machine that is the time itself, and on a busy one it leaves out what others took.

Two models: the bundled demo model, and a Llama with seeded random weights. Rounds go over all
settings, so that a disturbance of the machine does not hit one setting alone.

Owns: nothing.  Thread-safety: sets torch's thread count; one measurement at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from vmalloc.engine import LLM, SamplingParams
from vmalloc.measuring.provenance import provenance, spread, write_json

PAGE_SIZES = [4096, 16384, 65536, 1 << 18, 1 << 21]
BLOCK_SIZES = [1, 4, 16, 64, 256]
LENGTHS = [16, 128, 1024]
AUTO_PREEMPTIONS = 4
MODELS: dict[str, LlamaConfig | None] = {
    "demo": None,
    "random": LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=2048,
    ),
}


def make_model(name: str, seed: int) -> str | LlamaForCausalLM:
    """What ``LLM`` takes: the demo model's name, or a module."""
    config = MODELS[name]
    if config is None:
        return name
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class LoneSequence:
    """An engine that has computed one sequence and generates for as long as it is asked to."""

    def __init__(self, llm: LLM, prompt: list[int]) -> None:
        self._engine = llm.engine
        params = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
        self._engine.add_request("lone", {"prompt_token_ids": prompt}, params)
        self.next_token()
        self._group = self._engine.scheduler.running[0]

    def next_token(self) -> float:
        """Seconds until the sequence has one token more."""
        start = time.thread_time()
        while not any(output.outputs for output in self._engine.step()):
            pass
        return time.thread_time() - start

    def recompute(self) -> float:
        """Seconds from preemption until the next token. Requires: an engine in that mode."""
        start = time.thread_time()
        self._engine.scheduler.preempt(self._group)
        self.next_token()
        return time.thread_time() - start

    def swap(self) -> tuple[float, float, int]:
        """Seconds out, seconds in, bytes one way."""
        backend = self._engine.backend
        seq_ids = [seq.seq_id for seq in self._group.active]
        start = time.thread_time()
        is_out = backend.try_swap_out(seq_ids)
        out = time.thread_time()
        num_bytes = backend.stats().swapped_bytes
        back = time.thread_time()
        is_in = backend.try_swap_in(seq_ids)
        end = time.thread_time()
        if not (is_out and is_in):
            raise RuntimeError("the swap space is too small for this benchmark: a bug in it")
        return out - start, end - back, num_bytes

    def pick(self) -> str:
        """What the engine does when it preempts the sequence."""
        before = self._engine.stats().preempt_swap
        self._engine.scheduler.preempt(self._group)
        is_swap = self._engine.stats().preempt_swap > before
        self.next_token()
        return "swap" if is_swap else "recompute"


@contextmanager
def lone_sequence(
    model: str | LlamaForCausalLM, setting: dict[str, Any], length: int, mode: str
) -> Iterator[LoneSequence]:
    """A sequence of ``length`` tokens in an engine of its own."""
    with LLM(
        model,
        skip_tokenizer_init=True,
        preemption_mode=mode,  # type: ignore[arg-type]
        enable_prefix_caching=False,
        max_num_seqs=4,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        swap_space_bytes=256 << 20,
        **setting,
    ) as llm:
        prompt = np.random.default_rng(length).integers(3, 2048, length).tolist()
        yield LoneSequence(llm, prompt)


class Case:
    """Samples of one model, setting and length."""

    def __init__(
        self, model: str, kind: str, unit: int, length: int, module: str | LlamaForCausalLM
    ) -> None:
        unit_name = "page_size" if kind == "virtual" else "block_size"
        self.names: dict[str, Any] = {
            "model": model,
            "backend": kind,
            unit_name: unit,
            "num_tokens": length,
        }
        self._module = module
        self._setting = {"kv_backend": kind, unit_name: unit}
        self._seconds: dict[str, list[float]] = {
            name: [] for name in ("swap_out", "swap_in", "swap", "recompute")
        }
        self._picks: list[str] = []
        self._num_bytes = 0

    def measure(self, repeats: int) -> None:
        """Take ``repeats`` more samples of each time, after one that warms up."""
        place = (self._module, self._setting, self.names["num_tokens"])
        with lone_sequence(*place, "recompute") as lone:
            decode = statistics.median(lone.next_token() for _ in range(repeats + 1))
            lone.recompute()
            for _ in range(repeats):
                self._seconds["recompute"].append(max(0.0, lone.recompute() - decode))
            lone.swap()
            for _ in range(repeats):
                seconds_out, seconds_in, self._num_bytes = lone.swap()
                self._seconds["swap_out"].append(seconds_out)
                self._seconds["swap_in"].append(seconds_in)
                self._seconds["swap"].append(seconds_out + seconds_in)
        with lone_sequence(*place, "auto") as lone:
            self._picks = [lone.pick() for _ in range(AUTO_PREEMPTIONS)]

    def result(self) -> dict[str, Any]:
        """Milliseconds: median with the lowest and highest."""
        times = {
            f"{name}_ms": spread([1e3 * value for value in seconds])
            for name, seconds in self._seconds.items()
        }
        return {
            **self.names,
            "swapped_bytes": self._num_bytes,
            **times,
            "recompute_over_swap": (times["recompute_ms"]["median"] / times["swap_ms"]["median"]),
            "auto_first": self._picks[0],
            "auto_later": self._picks[-1],
        }


def make_cases(model_name: str, lengths: list[int], seed: int) -> list[Case]:
    """All settings and lengths of one model."""
    module = make_model(model_name, seed)
    settings = [("virtual", size) for size in PAGE_SIZES] + [("paged", n) for n in BLOCK_SIZES]
    return [
        Case(model_name, kind, unit, length, module)
        for length, (kind, unit) in itertools.product(lengths, settings)
    ]


def measure_all(
    lengths: list[int], rounds: int, repeats: int, seed: int, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """Every case of every model, in ``rounds`` of ``repeats`` samples."""
    rows = []
    for model_name in MODELS:
        cases = make_cases(model_name, lengths, seed)
        for _, case in itertools.product(range(rounds), cases):
            case.measure(repeats)
            tick()
        rows += [case.result() for case in cases]
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    console = Console()
    for model in MODELS:
        table = Table("tokens", "unit", "swap ms", "recompute ms", "ratio", "auto")
        table.title = f"Out and in by swap against recompute, {model} model"
        for row in rows:
            if row["model"] != model:
                continue
            table.add_row(
                f"{row['num_tokens']:,}",
                unit_of(row),
                _cell(row["swap_ms"]),
                _cell(row["recompute_ms"]),
                f"{row['recompute_over_swap']:.1f}",
                row["auto_later"],
            )
        console.print(table)
    console.print("CPU time, median (lowest..highest); ratio: recompute over swap.", style="dim")


def unit_of(row: dict[str, Any]) -> str:
    """Page or block size, for people."""
    if row["backend"] == "paged":
        return f"block {row['block_size']}"
    size = row["page_size"]
    return f"page {size >> 10}K" if size < 1 << 20 else f"page {size >> 20}M"


def _cell(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} ({value['min']:.3g}..{value['max']:.3g})"


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds by unit: one row of panels per model, one line per length and kind."""
    from vmalloc.measuring.figures import LENGTH_COLORS, new_panels, save_figure

    panels = list(itertools.product(MODELS, ("virtual", "paged")))
    figure, axes = new_panels(len(MODELS), 2, width=9.0, height=5.6, sharey="row")
    lengths = sorted({row["num_tokens"] for row in rows})
    for axis, (model, backend) in zip(axes, panels, strict=True):
        for length, color in zip(lengths, LENGTH_COLORS, strict=False):
            line = [
                row
                for row in rows
                if (row["model"], row["backend"], row["num_tokens"]) == (model, backend, length)
            ]
            names = [unit_of(row).split()[1] for row in line]
            swap = [row["swap_ms"]["median"] for row in line]
            recompute = [row["recompute_ms"]["median"] for row in line]
            axis.plot(names, recompute, "--", color=color, label=f"recompute, {length:,} tokens")
            axis.plot(names, swap, "o-", color=color, ms=4, label=f"swap, {length:,} tokens")
        axis.set_yscale("log")
        axis.set_title(f"{model} model, {backend}")
        axis.set_xlabel("page, bytes" if backend == "virtual" else "block, tokens")
    for axis in axes[::2]:
        axis.set_ylabel("ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the figure here (needs matplotlib).")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Short sequences, one round.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds the random model.")] = 0,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: show this result of an earlier run.")
    ] = None,
) -> None:
    """Measure what a preemption costs; see the head of this file."""
    if redraw is not None:
        show(json.loads(redraw.read_text()), figure)
        return
    torch.set_num_threads(1)
    lengths, rounds, repeats = (LENGTHS[:2], 1, 1) if quick else (LENGTHS, 2, 3)
    num_units = len(PAGE_SIZES) + len(BLOCK_SIZES)
    result: dict[str, Any] = {
        "provenance": provenance(seed),
        "random_model": MODELS["random"].to_diff_dict(),  # type: ignore[union-attr]
    }
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(
            "preemptions", total=len(MODELS) * num_units * len(lengths) * rounds
        )
        result["rows"] = measure_all(lengths, rounds, repeats, seed, lambda: progress.advance(task))
    write_json(json_file, result)
    show(result, figure)


def show(result: dict[str, Any], figure: Path | None) -> None:
    """Print a result, and write its figure where it is wanted."""
    print_tables(result["rows"])
    if figure is not None:
        draw_figure(result["rows"], figure)


if __name__ == "__main__":
    typer.run(main)

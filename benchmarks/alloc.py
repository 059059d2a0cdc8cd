"""What the allocator costs: time per decode step, pages per second, commits hidden by the worker.

Three measurements, no model:

- ``step``: begin_step + try_extend by one token for every sequence + end_step, through
  ``KVBackend``, for steps in which no sequence needs a page and for steps in which all do: pages
  that have to be created, and then the same growth again over pages that exist already. The
  host driver up to 1,024 sequences; beyond, the kernel's mapping limit ends it, so the ``null``
  driver (no memory, the same books).
- ``commit``: pages per second, mapped on the critical path: created new, or free already.
- ``hidden``: share of pages that the worker mapped before they were needed, in a decode loop that
  computes (a matrix product on one thread) between steps.

Owns: nothing.  Thread-safety: one process, one measurement at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, VirtualKVCache
from vmalloc.measuring.provenance import provenance, spread, write_json

TOKENS_PER_PAGE = 16  # 4 KiB rows on 64 KiB pages
LAYERS = (LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64),) * 4
STEP_CASES = [(1, "host"), (32, "host"), (256, "host"), (1024, "host"), (10_000, "null")]


def make_cache(num_seqs: int, max_len: int, driver: str, **settings: Any) -> VirtualKVCache:
    row_bytes = sum(layer.k_bytes + layer.v_bytes for layer in LAYERS)
    return VirtualKVCache(
        KVCacheConfig(
            layers=LAYERS,
            max_num_seqs=num_seqs,
            num_slots=num_seqs,
            max_seq_len=max_len,
            capacity_bytes=num_seqs * max_len * row_bytes + (1 << 20),
            driver=driver,  # type: ignore[arg-type]
            **settings,
        )
    )


def measure_step(num_seqs: int, driver: str, num_pages: int) -> dict[str, Any]:
    """Microseconds per step with and without a page boundary, over ``num_pages`` pages each."""
    cache = make_cache(num_seqs, TOKENS_PER_PAGE * (num_pages + 1), driver, commit_ahead_tokens=0)
    ids = list(range(num_seqs))
    assert cache.try_admit(SequenceGroupSpec(tuple(ids), TOKENS_PER_PAGE)) is not None
    plain: list[float] = []
    creating: list[float] = []
    mapping: list[float] = []
    for crossing in (creating, mapping):
        for length in range(TOKENS_PER_PAGE + 1, TOKENS_PER_PAGE * (num_pages + 1) + 1):
            lengths = [length] * num_seqs
            start = time.perf_counter()
            step = cache.begin_step()
            if not cache.try_extend(ids, lengths):
                raise RuntimeError("the pool is too small for this benchmark: a bug in it")
            cache.end_step(step)
            elapsed = (time.perf_counter() - start) * 1e6
            (crossing if length % TOKENS_PER_PAGE == 1 else plain).append(elapsed)
        for seq_id in ids:
            cache.truncate(seq_id, TOKENS_PER_PAGE)
    cache.close()
    return {
        "num_seqs": num_seqs,
        "driver": driver,
        "plain_us": spread(plain),
        "crossing_created_us": spread(creating),
        "crossing_resident_us": spread(mapping),
        "plain_us_per_seq": spread([value / num_seqs for value in plain]),
    }


def measure_commit(page_bytes: int, repeats: int) -> dict[str, Any]:
    """Pages per second for one sequence that grows to 512 pages at once."""
    num_pages = 512
    fresh, resident = [], []
    for _ in range(repeats):
        rows = num_pages * page_bytes // 4096
        cache = make_cache(2, rows, "host", page_bytes=page_bytes, commit_ahead_tokens=0)
        for seconds in (fresh, resident):
            assert cache.try_admit(SequenceGroupSpec((0,), 0)) is not None
            start = time.perf_counter()
            assert cache.try_extend([0], [rows])
            seconds.append(time.perf_counter() - start)
            cache.truncate(0, 0)  # unmaps: the pages are free, and hold memory
            cache.free([0])
        cache.close()
    return {
        "page_bytes": page_bytes,
        "fresh_pages_per_s": spread([num_pages / value for value in fresh]),
        "resident_pages_per_s": spread([num_pages / value for value in resident]),
    }


def measure_hidden(
    commit_ahead_tokens: int, num_seqs: int, num_steps: int, seed: int
) -> dict[str, Any]:
    """Share of pages the worker mapped, and time the engine waited for pages."""
    cache = make_cache(num_seqs, 4096, "host", commit_ahead_tokens=commit_ahead_tokens)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(100, 400, num_seqs).tolist()
    ids = list(range(num_seqs))
    for seq_id, length in zip(ids, lengths, strict=True):
        assert cache.try_admit(SequenceGroupSpec((seq_id,), length)) is not None
    cache.wait_worker()
    before = cache.stats()
    torch.set_num_threads(1)
    matrix = torch.randn(640, 640)  # a few milliseconds of compute, as a small model's step has
    start = time.perf_counter()
    for _ in range(num_steps):
        step = cache.begin_step()
        lengths = [length + 1 for length in lengths]
        assert cache.try_extend(ids, lengths)
        matrix @ matrix
        cache.end_step(step)
    elapsed = time.perf_counter() - start
    after = cache.stats()
    cache.close()
    background = after.background_pages - before.background_pages
    critical = after.critical_pages - before.critical_pages
    return {
        "commit_ahead_tokens": commit_ahead_tokens,
        "num_seqs": num_seqs,
        "num_steps": num_steps,
        "step_ms": elapsed / num_steps * 1e3,
        "background_pages": background,
        "critical_pages": critical,
        "hidden_share": background / (background + critical),
        "stall_us_per_step": (after.stall_us - before.stall_us) / num_steps,
        "mean_ahead_pages": after.ahead_bytes / after.page_bytes,
    }


def print_tables(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("sequences", "driver", "no page", "per sequence", "all create", "all map")
    table.title = "us per step"
    for row in result["step"]:
        table.add_row(
            f"{row['num_seqs']:,}",
            row["driver"],
            _cell(row["plain_us"], 1),
            _cell(row["plain_us_per_seq"], 3),
            _cell(row["crossing_created_us"], 0),
            _cell(row["crossing_resident_us"], 0),
        )
    console.print(table)
    table = Table("page", "pages/s, created new", "pages/s, free already", "GiB/s new")
    for row in result["commit"]:
        fresh = row["fresh_pages_per_s"]
        table.add_row(
            f"{row['page_bytes'] // 1024} KiB",
            _cell(fresh, 0),
            _cell(row["resident_pages_per_s"], 0),
            f"{fresh['median'] * row['page_bytes'] / 2**30:.2f}",
        )
    console.print(table)
    table = Table(
        "commit-ahead", "ms/step", "by worker", "while waiting", "hidden", "stall us/step"
    )
    for row in result["hidden"]:
        table.add_row(
            f"{row['commit_ahead_tokens']} tokens",
            f"{row['step_ms']:.2f}",
            str(row["background_pages"]),
            str(row["critical_pages"]),
            f"{row['hidden_share']:.1%}",
            f"{row['stall_us_per_step']:.1f}",
        )
    console.print(table)
    console.print("Median (lowest..highest).", style="dim")


def _cell(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:,.{digits}f} ({value['min']:,.{digits}f}..{value['max']:,.{digits}f})"


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer repeats, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds the sequence lengths.")] = 0,
) -> None:
    """Measure the allocator alone; see the head of this file."""
    num_pages, repeats, num_steps = (3, 2, 100) if quick else (12, 9, 1000)
    result: dict[str, Any] = {"provenance": provenance(seed)}
    err = Console(stderr=True)
    result["step"] = [
        measure_step(num_seqs, driver, num_pages)
        for num_seqs, driver in track(STEP_CASES, "steps", console=err)
    ]
    result["commit"] = [
        measure_commit(page_bytes, repeats)
        for page_bytes in track([16384, 65536, 1 << 18], "commits", console=err)
    ]
    result["hidden"] = [
        measure_hidden(ahead, 32, num_steps, seed)
        for ahead in track([0, 1, 4, 8], "worker", console=err)
    ]
    print_tables(result)
    write_json(json_file, result)


if __name__ == "__main__":
    typer.run(main)

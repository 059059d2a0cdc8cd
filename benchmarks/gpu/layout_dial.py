"""The layout dial: layers a group x page size, against attention time, driver calls and waste.

32 sequences of seeded lengths around 2,048 rows in the 8B shape, commit-ahead off. Attention is our
dispatch over all 32 layers in one CUDA graph; growth is 64 decode steps.

result: ``rows`` [{layers_per_group, page_bytes, attention_us (all layers), pages_per_step,
map_calls_per_step, access_calls_per_step, extend_us, waste (share of committed bytes without a
token), committed_bytes}].

Expected: the more layers a group, the less waste and the fewer pages a step, at some cost in
attention time; larger pages waste more and map less often.

Owns: one cache at a time.  Thread-safety: none; one process, torch's current stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vmalloc.kernels.buckets import bucket_rows
from vmalloc.kernels.select import select_kernels

from vmalloc import VirtualKVCache

from .attention_calls import make_batch
from .caches import ModelShape, admit, fill, make_cache, model_shape
from .devices import make_driver
from .section import Section, run_section
from .timing import capture, compare_us, spread, timed

GROUPS = (32, 1, 8, 4, 16)
PAGE_MIB = (2, 4, 8)
NUM_SEQS = 32
MEAN_LENGTH = 2048
NUM_STEPS = 64


def main(section: Section) -> None:
    shape = model_shape(section)
    groups, sizes = GROUPS, [mib << 20 for mib in PAGE_MIB]
    if section.dry_run:
        groups, sizes = (2, 1), [64 << 10, 128 << 10]
    for page_bytes in sizes:
        for group in groups:
            if section.has_time_for(f"{group} layers a group, pages of {page_bytes} bytes", 4):
                section.add("rows", measure(section, shape, group, page_bytes))
    if not any(row["pages_per_step"] for row in section.result.get("rows", [])):
        raise RuntimeError("no sequence needed a page at any position of the dial")


def measure(section: Section, shape: ModelShape, group: int, page_bytes: int) -> dict[str, Any]:
    """One position of the dial."""
    num_seqs, mean, num_steps = NUM_SEQS, MEAN_LENGTH, NUM_STEPS
    if section.dry_run:
        num_seqs, mean, num_steps = 2, 100, 40
    torch.manual_seed(section.seed)
    lengths = draw_lengths(num_seqs, mean, section.seed)
    driver = make_driver(section, page_bytes)
    cache = make_cache(
        section,
        shape,
        driver=driver,
        max_num_seqs=num_seqs,
        max_seq_len=2 * mean,
        num_tokens=sum(lengths) + num_seqs * num_steps,
        page_bytes=page_bytes,
        layers_per_group=group,
    )
    slots = admit(cache, lengths)
    fill(cache, range(num_seqs))
    row: dict[str, Any] = {"layers_per_group": group, "page_bytes": page_bytes}
    if section.dry_run:
        section.skip("attention over the dial", "no GPU")
    else:
        row["attention_us"] = spread(time_attention(section, shape, cache, slots, lengths))
    row |= grow(cache, driver, lengths, num_steps)
    cache.close()
    return row


def time_attention(
    section: Section, shape: ModelShape, cache: VirtualKVCache, slots: list[int], lengths: list[int]
) -> list[float]:
    """Microseconds of one decode step's attention, all layers in one graph."""
    kernels = select_kernels(
        shape.layers, device="cuda", has_block_table=False, num_heads=shape.num_heads
    )
    batch = make_batch(shape, slots, lengths, 1, section.device)
    view = batch.view(bucket_rows(max(lengths), cache.config.max_seq_len))

    def walk() -> None:
        for layer_idx in range(shape.num_layers):
            kernels.varlen_attention(
                batch.query, *cache.layer_views(layer_idx), view, softmax_scale=batch.scale
            )

    graph = capture(walk, device=section.device)
    return compare_us({"step": graph}, device=section.device, rounds=20)["step"]


def grow(cache: VirtualKVCache, driver: Any, lengths: list[int], num_steps: int) -> dict[str, Any]:
    """One token a step for everyone: calls, pages and host time a step; then the waste."""
    seq_ids = list(range(len(lengths)))
    before, counters = cache.stats(), driver.counters()
    times: list[float] = []
    for index in range(1, num_steps + 1):
        timed(times, _step, cache, seq_ids, [length + index for length in lengths])
    after, counted = cache.stats(), driver.counters()
    return {
        "pages_per_step": (after.critical_pages - before.critical_pages) / num_steps,
        "map_calls_per_step": (counted["map_calls"] - counters["map_calls"]) / num_steps,
        "access_calls_per_step": (counted["access_calls"] - counters["access_calls"]) / num_steps,
        "extend_us": spread(times, 1),
        "waste": 1 - after.live_bytes / after.committed_bytes,
        "committed_bytes": after.committed_bytes,
    }


def _step(cache: VirtualKVCache, seq_ids: list[int], totals: list[int]) -> None:
    opened = cache.begin_step()
    if not cache.try_extend(seq_ids, totals):
        raise RuntimeError("the pool is too small for this benchmark: a bug in it")
    cache.end_step(opened)


def draw_lengths(num_seqs: int, mean: int, seed: int) -> list[int]:
    """Lognormal lengths around ``mean``, cut at one and a half times it."""
    sigma = 0.5
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, num_seqs)
    return [int(length) for length in drawn.clip(mean // 8, mean * 3 // 2)]


if __name__ == "__main__":
    run_section("layout", main)

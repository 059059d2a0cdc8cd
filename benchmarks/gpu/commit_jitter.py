"""What growth costs a step: pages mapped inline, or ahead of need while the GPU computes.

64 sequences in the 8B shape grow by a token a step, so four of them need a page in every step. A
step opens, extends everyone, enqueues matrix products of about 6 ms, closes and waits for the GPU,
as an engine does that reads the new tokens. "new" pages are created by the driver when they are
needed; "pooled" ones exist already and are only mapped.

result: ``rows`` [{commit_ahead_tokens, pool, step_ms, allocator_us (host time of begin, extend and
end), critical_pages, background_pages, hidden_share, stall_us_per_step}] with percentiles p50, p90,
p99, max.

Expected: ahead, the allocator's time is that of a step without pages, and the step's tail is the
computation's; inline and new is the worst.

Owns: one cache at a time.  Thread-safety: none; the cache's worker is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vmalloc import VirtualKVCache

from .caches import admit, make_cache, model_shape
from .section import Section, run_section
from .timing import percentiles

CASES = ((0, "new"), (4, "new"), (0, "pooled"), (4, "pooled"))
NUM_SEQS = 64
NUM_STEPS = 320
FIRST_LENGTH = 256


def main(section: Section) -> None:
    compute = make_compute(section)
    for round_idx in range(1 if section.dry_run else 2):
        for ahead, pool in CASES if round_idx % 2 == 0 else reversed(CASES):
            if section.has_time_for(f"commit-ahead {ahead}, {pool} pages", 5):
                section.add("rows", measure(section, compute, ahead, pool))


def make_compute(section: Section) -> Callable[[], None]:
    """Enqueues a step's worth of work."""
    size = 64 if section.dry_run else 8192
    left = torch.randn(size, size, dtype=torch.bfloat16, device=section.device)
    out = torch.empty_like(left)

    def compute() -> None:
        for _ in range(4):
            torch.mm(left, left, out=out)

    return compute


def measure(section: Section, compute: Callable[[], None], ahead: int, pool: str) -> dict[str, Any]:
    """One way to get pages, over ``NUM_STEPS`` steps."""
    shape = model_shape(section)
    num_seqs, num_steps = (NUM_SEQS, NUM_STEPS) if not section.dry_run else (4, 72)
    # Staggered, so that the sequences cross page boundaries in different steps.
    lengths = [FIRST_LENGTH + idx % 16 for idx in range(num_seqs)]
    last = FIRST_LENGTH + 16 + num_steps
    cache = make_cache(
        section,
        shape,
        max_num_seqs=num_seqs,
        max_seq_len=last + 16,
        num_tokens=num_seqs * (last + 16),
        commit_ahead_tokens=ahead,
    )
    if pool == "pooled":
        admit(cache, [last] * num_seqs)
        empty_slots(cache, num_seqs)
    admit(cache, lengths)
    cache.wait_worker()
    before = cache.stats()
    seq_ids = list(range(num_seqs))
    steps, allocator = [], []
    for index in range(1, num_steps + 1):
        totals = [length + index for length in lengths]
        start = time.perf_counter_ns()
        opened = cache.begin_step()
        if not cache.try_extend(seq_ids, totals):
            raise RuntimeError("the pool is too small for this benchmark: a bug in it")
        extended = time.perf_counter_ns()
        compute()
        closing = time.perf_counter_ns()
        cache.end_step(opened)
        closed = time.perf_counter_ns()
        if not section.dry_run:
            torch.cuda.synchronize()
        steps.append((time.perf_counter_ns() - start) / 1e6)
        allocator.append((extended - start + closed - closing) / 1e3)
    after = cache.stats()
    cache.close()
    critical = after.critical_pages - before.critical_pages
    background = after.background_pages - before.background_pages
    if critical + background == 0:
        raise RuntimeError(f"no sequence needed a page in {num_steps} steps")
    return {
        "commit_ahead_tokens": ahead,
        "pool": pool,
        "step_ms": percentiles(steps),
        "allocator_us": percentiles(allocator, 1),
        "critical_pages": critical,
        "background_pages": background,
        "hidden_share": background / max(1, background + critical),
        "stall_us_per_step": (after.stall_us - before.stall_us) / num_steps,
    }


def empty_slots(cache: VirtualKVCache, num_seqs: int) -> None:
    """End all sequences and unmap their pages, which stay created."""
    step = cache.begin_step()
    for seq_id in range(num_seqs):
        cache.truncate(seq_id, 0)
    cache.free(range(num_seqs))
    cache.end_step(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    # Pages come back once a later step finds that the one that may still read them is over.
    for _ in range(4):
        cache.end_step(cache.begin_step())
    if cache.stats().retired_pages:
        raise RuntimeError(f"{cache.stats().retired_pages} pages still wait for an ended step")


if __name__ == "__main__":
    run_section("commit_jitter", main)

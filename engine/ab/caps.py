"""How much KV memory a workload gets: so little that memory limits its batches.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backend import KVBackend
from .workload import Workload, WorkloadRequest

SHARE = 0.5
"""Of what all requests of a workload would hold at once."""

ROOMY_SHARE = 1.5
ROOMY = ("bursty",)
"""Workloads that have room for everybody, to compare latencies where memory does not matter."""

LEAST_REQUESTS = 2
"""So many of the largest request fit in any case: one alone is no batch."""

SPARE_PAGES = 2
"""What a sequence needs beyond its tokens: a partly used page, and one to copy."""

_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Cap:
    """The cap of a workload.

    Attributes:
        num_bytes: hard cap on physical KV memory.
        demand_bytes: what all its requests would hold at once, shared where they can share.
        words: where it comes from.
    """

    num_bytes: int
    demand_bytes: int
    words: str


def choose_cap(workload: Workload, backend: KVBackend, asked_bytes: int | None) -> Cap:
    """``asked_bytes``, or a share of what the workload demands that holds its largest request."""
    token_bytes, page_bytes = backend.config.token_bytes, backend.stats().page_bytes
    requests = workload.requests
    demand = distinct_prompt_tokens(workload) * token_bytes + sum(
        _output_bytes(one, token_bytes, page_bytes) for one in requests
    )
    if asked_bytes is not None:
        return Cap(asked_bytes, demand, "asked for")
    largest = max(
        len(one.prompt_token_ids) * token_bytes + _output_bytes(one, token_bytes, page_bytes)
        for one in requests
    )
    is_roomy = workload.name in ROOMY
    wanted = max((ROOMY_SHARE if is_roomy else SHARE) * demand, LEAST_REQUESTS * largest)
    num_bytes = -(-int(wanted) // page_bytes) * page_bytes
    words = f"{num_bytes / demand:.0%} of what all requests would hold at once"
    return Cap(num_bytes, demand, words + ("; room for all" if is_roomy else ""))


def distinct_prompt_tokens(workload: Workload) -> int:
    """Tokens of all prompts, where equal beginnings count once; compared by 16 tokens."""
    seen: set[int] = set()
    total = 0
    for one in workload.requests:
        prompt, prefix = one.prompt_token_ids, 0
        for start in range(0, len(prompt), _CHUNK):
            chunk = prompt[start : start + _CHUNK]
            prefix = hash((prefix, chunk))
            total += 0 if prefix in seen else len(chunk)
            seen.add(prefix)
    return total


def _output_bytes(request: WorkloadRequest, token_bytes: int, page_bytes: int) -> int:
    """Pages of all completions of a request, which share nothing but its prompt."""
    num_pages = -(-request.num_output_tokens * token_bytes // page_bytes) + SPARE_PAGES
    return request.num_completions * num_pages * page_bytes

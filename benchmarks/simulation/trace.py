"""Who asks when, with how long a prompt, for how many tokens.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from workload import ALPACA, SHAREGPT, Lengths, make_trace

LENGTHS = {"alpaca": ALPACA, "sharegpt": SHAREGPT}
"""Lognormal lengths with the means of the PagedAttention paper; see ``workload.py``."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, as arrays.

    Attributes:
        arrival_s: seconds after the start.
        prompt_tokens, output_tokens: of each request.
        shared_tokens: leading tokens of each prompt that all requests of a group have in common.
        shared_group: the group.
        width: sequences of every request.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    shared_tokens: int = 0
    shared_group: NDArray[np.int64] | None = None
    width: int = 1

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def prompt(self, idx: int) -> list[int]:
        """Token ids of a request's prompt: its own, but for what its group shares."""
        num_tokens = int(self.prompt_tokens[idx])
        own = idx + 1  # positive; generated and shared tokens are not
        if self.shared_group is None:
            return [own] * num_tokens
        shared = min(self.shared_tokens, num_tokens)
        group = -(1 << 32) - int(self.shared_group[idx])
        return [group] * shared + [own] * (num_tokens - shared)

    def repeated(self, count: int) -> Trace:
        """Every request so many times, each with a prompt of its own."""
        return replace(
            self,
            arrival_s=self.arrival_s.repeat(count),
            prompt_tokens=self.prompt_tokens.repeat(count),
            output_tokens=self.output_tokens.repeat(count),
            shared_group=None if self.shared_group is None else self.shared_group.repeat(count),
        )


def draw_trace(
    lengths: Lengths,
    num_requests: int,
    seed: int,
    *,
    rate: float | None = None,
    shared_tokens: int = 0,
    num_groups: int = 1,
    width: int = 1,
) -> Trace:
    """Requests of seeded lengths.

    Args:
        rate: requests per second, arriving as a Poisson process; None: all are there at the start.
        shared_tokens: put before each prompt, the same ones for all requests of a group.
        num_groups: groups of requests, equally likely.
        width: sequences of every request.
    """
    drawn = make_trace(lengths, num_requests, seed)
    prompts = np.fromiter((request.num_prompt for request in drawn), np.int64, num_requests)
    outputs = np.fromiter((request.num_output for request in drawn), np.int64, num_requests)
    rng = np.random.default_rng([seed, num_requests])
    if rate is None:
        arrivals = np.zeros(num_requests)
    else:
        arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
    return Trace(
        name=lengths.name,
        arrival_s=arrivals,
        prompt_tokens=prompts + shared_tokens,
        output_tokens=outputs,
        shared_tokens=shared_tokens,
        shared_group=rng.integers(0, num_groups, num_requests) if shared_tokens else None,
        width=width,
    )


def read_trace(path: Path, num_requests: int | None = None) -> Trace:
    """The first requests of a CSV file with columns ``arrival_s,prompt_tokens,output_tokens``.

    Raises ``ValueError`` naming the line of what cannot be a request.
    """
    rows: list[tuple[float, int, int]] = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            if num_requests is not None and len(rows) == num_requests:
                break
            rows.append(_read_row(record, len(rows) + 2))
    if not rows:
        raise ValueError(f"{path} has no requests")
    rows.sort(key=lambda row: row[0])
    arrivals, prompts, outputs = zip(*rows, strict=True)
    return Trace(path.name, np.array(arrivals), np.array(prompts), np.array(outputs))


def _read_row(record: dict[str, str], line: int) -> tuple[float, int, int]:
    try:
        row = (
            float(record["arrival_s"]),
            int(record["prompt_tokens"]),
            int(record["output_tokens"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"line {line} is no request: {error!r}") from error
    if not (row[0] >= 0 and row[1] >= 1 and row[2] >= 1):
        raise ValueError(
            f"line {line}: arrival_s, prompt_tokens and output_tokens are {row}; they must be at "
            "least 0, 1 and 1"
        )
    return row

"""Reads a workload from a CSV file: ``arrival_s,prompt_tokens,output_tokens``.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError
from .workload import Workload, WorkloadRequest

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_DIGITS = 9
MAX_ARRIVAL_S = 7 * 86_400.0
"""Whoever waits longer has seconds since 1970 in the file, or milliseconds."""


def read_trace(path: Path, *, vocab_size: int, context_tokens: int, seed: int = 0) -> Workload:
    """The requests of a trace, with random prompts of the lengths that it says.

    The first line names the columns, in any order. A line is one request: when it is made, in
    seconds, and its lengths in tokens; lines need not be in the order of arrival.

    Raises ``ConfigError`` that names the file, the line and the value which cannot be used.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_read_rows(path, csv.reader(file), context_tokens))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace is {str(path)!r}; it cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"trace is {str(path)!r}; it has no requests")
    rng = np.random.default_rng([seed, len(rows)])
    requests = [
        WorkloadRequest(arrival_s, tuple(rng.integers(1, vocab_size, prompt).tolist()), output)
        for arrival_s, prompt, output in sorted(rows, key=lambda row: row[0])
    ]
    return Workload(path.name, "requests of a trace file", tuple(requests), is_realtime=True)


def _read_rows(path: Path, reader: Any, context_tokens: int) -> Iterator[tuple[float, int, int]]:
    places: list[int] | None = None
    for line in reader:
        cells = [cell.strip() for cell in line]
        if not any(cells):
            continue
        where = f"trace {str(path)!r}, line {reader.line_num}"
        if places is None:
            places = _read_header(where, cells)
            continue
        if len(cells) != len(COLUMNS):
            raise ConfigError(f"{where}: {','.join(cells)!r} has {len(cells)} values, not 3")
        arrival, prompt, output = (cells[place] for place in places)
        arrival_s = _read_seconds(where, arrival)
        num_prompt = _read_count(where, "prompt_tokens", prompt)
        num_output = _read_count(where, "output_tokens", output)
        if num_prompt + num_output > context_tokens:
            raise ConfigError(
                f"{where}: prompt_tokens is {num_prompt} and output_tokens {num_output}; together "
                f"they must not exceed the context, {context_tokens} tokens"
            )
        yield arrival_s, num_prompt, num_output


def _read_header(where: str, cells: list[str]) -> list[int]:
    if sorted(cells) != sorted(COLUMNS):
        raise ConfigError(f"{where}: {','.join(cells)!r}; it must be {','.join(COLUMNS)}")
    return [cells.index(name) for name in COLUMNS]


def _read_seconds(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_ARRIVAL_S:
        raise ConfigError(
            f"{where}: arrival_s is {text!r}; it must be seconds since the start, from 0 to "
            f"{MAX_ARRIVAL_S:.0f}"
        )
    return value


def _read_count(where: str, name: str, text: str) -> int:
    is_number = text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
    if not is_number or int(text) < 1:
        raise ConfigError(f"{where}: {name} is {text!r}; it must be an integer, at least 1")
    return int(text)

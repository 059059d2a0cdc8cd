"""Whether a kernel touches rows past a sequence's end, and whether its CUDA graphs survive growth.

Four sequences over our own cache, whole pages mapped and nothing after them, no lookahead; every
mapped row past the end holds NaN. A bad read ends a CUDA context: probes run in a child process,
and where one kills it, the rest get another one.

result: ``rows`` [{kernel, length, mapped_rows, expected, found, rel_error, is_as_expected}] with
``found`` one of "exact" (finite, relative error under 1e-2), "nan", "wrong", "error 700", or
another error; ``graphs``: the same for one capture replayed while sequences grow into new pages and
one ends and another begins, with ``lengths`` and ``rel_errors`` of the replays.

Expected: "exact" for torch's FlashAttention, flash-attn, Triton, flashinfer, SDPA and FA3 through
its identity table; "error 700" for FA3 by TMA, which loads whole tiles and here is denied its
lookahead rows. "raw" is the library called as it is, "ours" our dispatch told to use it, or its own
choice.

Owns: its child processes.  Thread-safety: none; one process at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .prepare import ROOT
from .section import STAND_IN, Section, run_section

LENGTHS = (17, 100, 1000)
DRY_LENGTHS = (17, 70)  # Triton's interpreter takes its time
GRAPH = "graph"
MAX_FRUITLESS = 4  # children in a row that died at their first probe
Task = tuple[str, int | str]
"""A kernel's name, and a length or ``GRAPH``."""


EXPECTED = {
    "ours": "exact",
    "ours torch": "exact",
    "ours fa2": "exact",
    "ours triton": "exact",
    "raw torch": "exact",
    "raw fa2": "exact",
    "ours fa3": "exact",
    "ours flashinfer": "exact",
    "ours sdpa": "exact",
    "ours fa3-tma": "error 700",
}


def main(section: Section) -> None:
    lengths = DRY_LENGTHS if section.dry_run else LENGTHS
    left: list[Task] = [
        (kernel, length)
        for kernel, expected in EXPECTED.items()
        for length in ((*lengths, GRAPH) if expected == "exact" else lengths)
    ]
    num_fruitless = 0
    while left and section.has_time_for(f"{len(left)} probes from {left[0]}", 10):
        num_before = len(left)
        left = run_in_child(section, left)
        num_fruitless = num_fruitless + 1 if len(left) == num_before - 1 else 0
        if num_fruitless > MAX_FRUITLESS:
            break
    reports = section.result.get("rows", []) + section.result.get("graphs", [])
    bad = [
        f"{one['kernel']} at {one['length']}: {one['found']}"
        for one in reports
        if not one["is_as_expected"]
    ]
    if bad or not reports:
        raise RuntimeError(f"not as expected: {'; '.join(bad) or 'no report at all'}")


def run_in_child(section: Section, tasks: list[Task]) -> list[Task]:
    """Run tasks in one process until it dies; what is left for the next one."""
    command = [sys.executable, "-m", "benchmarks.gpu.probe", json.dumps(tasks)]
    command += ["--dry-run"] if section.dry_run else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=max(5.0, section.left_s()),
        )  # fmt: skip
        text, log = done.stdout, done.stderr or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        text, log = _decoded(error.stdout), f"{_decoded(error.stderr)}\nstopped: out of time"
    print(text + log[-3000:], flush=True)
    left = list(tasks)
    for line in text.splitlines():
        if line.startswith("{"):
            report = json.loads(line)
            _keep(section, report)
            is_absent = "absent" in report
            left = [
                task
                for task in left
                if task[0] != report["kernel"] or not (is_absent or task[1] == report["length"])
            ]
    if left:
        kernel, length = left.pop(0)
        found = _last_error(log)
        _keep(section, {"kernel": kernel, "length": length, "found": found, "rel_error": None})
    return left


def _keep(section: Section, report: dict[str, Any]) -> None:
    """Put a child's report where it belongs."""
    if "absent" in report:
        section.skip(report["kernel"], report["absent"])
        return
    if "mapped_rows" in report:
        section.set_driver(STAND_IN if section.dry_run else "cuda")
    expected = EXPECTED[report["kernel"]]
    report |= {"expected": expected, "is_as_expected": report["found"] == expected}
    section.add("graphs" if report["length"] == GRAPH else "rows", report)


def _last_error(log: str) -> str:
    if "illegal memory access" in log or "error 700" in log:
        return "error 700"
    lines = [line for line in log.strip().splitlines() if line and not line.startswith(" ")]
    return lines[-1][:200] if lines else "died without a word"


def _decoded(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    run_section("kernel_probes", main)

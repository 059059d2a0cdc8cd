"""What every worker does: load, construct, warm up, run one workload, say what it took.

Uses the standard library alone: each worker runs in its peer's own environment.

Owns: nothing.  Thread-safety: one thread; the peer may have more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STARTED = "PEER_STARTED_S"
"""Environment variable: ``time.monotonic()`` of the parent just before it started the worker."""


@dataclass(frozen=True)
class Request:
    """``n`` completions of ``max_tokens`` tokens each, greedy or sampled as the job says."""

    prompt: list[int]
    max_tokens: int
    n: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One stream of tokens. Times are those of ``time.monotonic()``."""

    request_idx: int
    token_ids: list[int]
    first_s: float
    last_s: float


@dataclass(frozen=True)
class Job:
    """What to run, and within which limits."""

    model: str
    options: dict[str, Any]
    threads: int
    is_greedy: bool
    seed: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    kv_bytes: int
    warm_up: list[Request]
    requests: list[Request]

    @classmethod
    def read(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        for name in ("warm_up", "requests"):
            fields[name] = [Request(**request) for request in fields[name]]
        return cls(**fields)


class Peer(Protocol):
    """An engine. ``load`` imports, ``construct`` makes it ready for requests."""

    def load(self) -> None: ...
    def construct(self, job: Job) -> None: ...
    def run(self, requests: list[Request]) -> list[Completion]: ...
    def kv_bytes(self) -> dict[str, int]: ...
    def versions(self) -> dict[str, str]: ...
    def pid(self) -> int: ...
    def close(self) -> None: ...


class CpuWindow:
    """CPU time of this process group, and of everything else, from now until ``close``."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._group_s = group_cpu_s(os.getpgrp())
        self._busy_s = busy_cpu_s()

    def close(self) -> dict[str, float]:
        wall_s = time.monotonic() - self._start_s
        group_s = group_cpu_s(os.getpgrp()) - self._group_s
        foreign_s = busy_cpu_s() - self._busy_s - group_s
        return {
            "wall_s": wall_s,
            "cpu_s": group_s,
            "foreign_cores": max(0.0, foreign_s) / wall_s,
        }


def busy_cpu_s(stat: Path = Path("/proc/stat")) -> float:
    """Seconds that all cores together were not idle; what a hypervisor took away counts."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, stat.read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def group_cpu_s(group: int, proc: Path = Path("/proc")) -> float:
    """CPU seconds of the live processes of a process group, and of their children that ended."""
    ticks = 0
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_S


def peak_rss_bytes(pid: int) -> int:
    """Most resident memory that a process had so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no VmHWM line")


def measure(peer: Peer, job: Job) -> dict[str, Any]:
    """One cold run; see the fields."""
    started_s = float(os.environ.get(STARTED) or time.monotonic())
    load_s = time.monotonic()
    peer.load()
    construct_s = time.monotonic()
    peer.construct(job)
    ready_s = time.monotonic()
    try:
        peer.run(job.warm_up)
        window, start_s = CpuWindow(), time.monotonic()
        completions = peer.run(job.requests)
        used = window.close()
        check_completions(job, completions)
        return {
            "import_s": construct_s - load_s,
            "construct_s": ready_s - construct_s,
            "ready_s": ready_s - started_s,
            **used,
            "output_tokens": sum(len(one.token_ids) for one in completions),
            "peak_rss_bytes": peak_rss_bytes(peer.pid()),
            "kv": peer.kv_bytes(),
            "versions": {"python": sys.version.split()[0], **peer.versions()},
            "streams": [
                {
                    "request_idx": one.request_idx,
                    "token_ids": one.token_ids,
                    "first_s": one.first_s - start_s,
                    "last_s": one.last_s - start_s,
                }
                for one in sorted(completions, key=lambda one: one.request_idx)
            ],
        }
    finally:
        peer.close()


def check_completions(job: Job, completions: list[Completion]) -> None:
    """Raises RuntimeError unless every stream is there in its full length."""
    lengths: list[list[int]] = [[] for _ in job.requests]
    for one in completions:
        lengths[one.request_idx].append(len(one.token_ids))
    for idx, request in enumerate(job.requests):
        expected = [request.max_tokens] * request.n
        if lengths[idx] != expected:
            raise RuntimeError(f"request {idx} got {lengths[idx]} tokens; expected {expected}")


def main(peer: Peer) -> None:
    """``python WORKER JOB RESULT``: two JSON files."""
    job_file, result_file = map(Path, sys.argv[1:3])
    result_file.write_text(json.dumps(measure(peer, Job.read(job_file))))

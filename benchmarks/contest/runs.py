"""One run: a peer's worker in a process of its own, and what it said.

Owns: the process while it runs.  Thread-safety: one process at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmalloc.measuring.provenance import ROOT

from .peers import WORKERS, Peer
from .workers.measured import STARTED, TICKS_PER_S, Job

PERCENTILES = (50, 99)
GRACE_S = 5.0
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
CLOCK_TICK_S = 1 / TICKS_PER_S


class RunFailed(Exception):
    """A worker did not give a result; the message says why."""


@dataclass(frozen=True)
class Limits:
    """What a run may take, and how much of others' work it may suffer."""

    threads: int
    timeout_s: float
    max_foreign_cores: float


def run_peer(peer: Peer, python: Path, job: Job, limits: Limits) -> dict[str, Any]:
    """What the worker measured, with latencies summed up. Raises ``RunFailed``."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        log_file = Path(folder) / "log"
        job_file.write_text(json.dumps(asdict(job)))
        command = [str(python), str(WORKERS / peer.worker), str(job_file), str(result_file)]
        returncode = _run_group(command, environment_of(peer, limits.threads), log_file, limits)
        if returncode != 0 or not result_file.exists():
            raise RunFailed(_reason(returncode, log_file, limits))
        result: dict[str, Any] = json.loads(result_file.read_text())
    result["tokens_per_s"] = result["output_tokens"] / result["wall_s"]
    result["tokens_per_cpu_s"] = result["output_tokens"] / max(result["cpu_s"], CLOCK_TICK_S)
    result["is_quiet"] = result["foreign_cores"] <= limits.max_foreign_cores
    result |= latencies(result["streams"])
    return result


def latencies(streams: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time to the first token, and mean time between a stream's later ones, in milliseconds."""
    first = [stream["first_s"] * 1e3 for stream in streams]
    between = [
        (stream["last_s"] - stream["first_s"]) * 1e3 / (len(stream["token_ids"]) - 1)
        for stream in streams
        if len(stream["token_ids"]) > 1
    ]
    return {"ttft_ms": percentiles(first), "tpot_ms": percentiles(between)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles, by name; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        f"p{percent}": ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
        for percent in PERCENTILES
    }


def environment_of(peer: Peer, threads: int) -> dict[str, str]:
    """The variables of a peer's process.

    How OpenMP's threads wait is each engine's own choice: ours never spin, and what this process
    set for them slows the others (llama.cpp to a fifth).
    """
    inherited = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    environment = {
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        STARTED: str(time.monotonic()),
        **peer.variables,
    }
    own_path = environment.pop("PYTHONPATH", "")
    if peer.is_ours:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), own_path]))
    return environment


def _run_group(
    command: list[str], environment: dict[str, str], log: Path, limits: Limits
) -> int | None:
    """The exit status, or None past the time limit; nothing of the group is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limits.timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)


def _reason(returncode: int | None, log: Path, limits: Limits) -> str:
    if returncode is None:
        return f"took more than {limits.timeout_s:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit status {returncode}: {lines[-1][:300] if lines else 'no word'}"

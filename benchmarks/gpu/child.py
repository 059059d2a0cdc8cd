"""A section's process: started in a group of its own, stopped with all of it at its limit.

Owns: the process while it runs.  Thread-safety: one thread a child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 3.0
"""Between the request to end and the end by force."""


@dataclass(frozen=True)
class Ending:
    """How a child ended; ``returncode`` is None if its time was up."""

    returncode: int | None
    wall_s: float


def run_child(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, limit_s: float, log: Path
) -> Ending:
    """Run ``command`` with both outputs in ``log``, for at most ``limit_s`` seconds."""
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            # What it left behind goes too: the next section must find the GPU idle.
            _stop_group(process)
    return Ending(returncode, time.monotonic() - start)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    if process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

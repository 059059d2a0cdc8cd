"""The processes of the ranks other than 0, as rank 0 sees them: started, watched, ended.

They are started through torch's own launcher, each in a session of its own, with rank 0's module
search path, and with their standard output on rank 0's standard error.

Owns: the child processes and one waiting thread for each.
Thread-safety: every method from any thread, ``end`` from one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .rank_environment import rank_variables

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsDest, SubprocessContext

TERMINATE_GRACE_S = 1.0
"""Between asking a process to end and making it."""

KILL_GRACE_S = 10.0
"""Not even this ends a process that a driver holds in the kernel; it is left behind then."""

_SETTLE_S = 1.0
"""What the others get to end by themselves, and say why, once a rank has been lost."""

_LAUNCHER = "torch.distributed.elastic.multiprocessing.api"

# Standard output belongs to what rank 0 writes. The module search path is rank 0's: the same files
# are loaded wherever rank 0 found them.
_BOOT = f"""
import json, os, sys
os.dup2(2, 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.stdout.reconfigure(line_buffering=True)
sys.path[:] = json.loads(os.environ.pop("VMALLOC_RANK_PATH"))
from {__package__}.rank_main import run
run()
"""


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank's process ended: ``code`` is its exit code, or minus the signal's number."""

    rank: int
    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return "its process is gone"
        if self.code >= 0:
            return f"its process ended with exit code {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = "signal"
        return f"its process was killed by {name} ({-self.code})"


class RankProcesses:
    """Ranks 1 to ``size - 1`` as child processes."""

    def __init__(
        self,
        size: int,
        port: int,
        arguments: Sequence[str],
        *,
        num_threads: int,
        on_loss: Callable[[], None],
    ) -> None:
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._ends: list[RankEnd] = []
        self._is_ending = False
        self._were_stopped: set[int] = set()
        self._taken: set[int] = set()  # ranks that somebody else has waited for
        self._context = _launch(
            {rank: _environment(rank, size, port, num_threads) for rank in range(1, size)},
            ["--parent", str(os.getpid()), *arguments],
        )
        self.pids = {index + 1: pid for index, pid in self._context.pids().items()}
        self._threads = [
            threading.Thread(
                target=self._watch, args=(rank,), name=f"vmalloc-rank-{rank}-watch", daemon=True
            )
            for rank in self.pids
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ends(self) -> list[RankEnd]:
        """The ranks that ended by themselves, in the order in which that was seen."""
        with self._changed:
            return list(self._ends)

    def wait_end(self, seconds: float) -> bool:
        """Wait until at least one rank has ended; False if none did."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ends), seconds)

    def stopped(self) -> list[int]:
        """Ranks whose processes are stopped, by SIGSTOP or a debugger, or were until ended here."""
        now = {rank for rank, pid in self.pids.items() if _process_state(pid) in ("T", "t")}
        return sorted(now | self._were_stopped)

    def end(self, grace_s: float) -> None:
        """Wait ``grace_s`` for the processes to end, then ask them to, then make them."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._join(grace_s)
        self._signal(signal.SIGKILL, self.stopped())  # these hear nothing else
        self._signal(signal.SIGTERM)
        self._join(TERMINATE_GRACE_S)
        self._signal(signal.SIGKILL)
        self._join(KILL_GRACE_S)
        for index, handler in self._context.subprocess_handlers.items():
            # Not reaped yet, so the number still means this session; what it started ends with it.
            if index + 1 not in self._taken:
                _kill_group(self.pids[index + 1], signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                handler.proc.wait(KILL_GRACE_S)
        with _quiet_launcher():
            self._context.close(timeout=1)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send it to all, or to ``ranks``, as far as they have not ended."""
        for thread, (rank, pid) in zip(self._threads, self.pids.items(), strict=True):
            if thread.is_alive() and (ranks is None or rank in ranks):
                _kill_group(pid, number)

    def _watch(self, rank: int) -> None:
        """Wait for one process to end, without reaping it; a bad end is the end of all."""
        code = _wait_exit(self.pids[rank])
        with self._changed:
            if code is None:
                self._taken.add(rank)
            if self._is_ending:
                return
            is_first = not any(end.code != 0 for end in self._ends)
            self._ends.append(RankEnd(rank, code))
            self._changed.notify_all()
            if code == 0 or not is_first:
                return
            # The others may wait for the lost one, and rank 0 for one of them.
            self._changed.wait_for(lambda: self._is_ending, _SETTLE_S)
            if self._is_ending:
                return
            self._is_ending = True
        self._were_stopped.update(self.stopped())
        self._signal(signal.SIGKILL)
        self._on_loss()


def _environment(rank: int, size: int, port: int, num_threads: int) -> dict[str, str]:
    variables = rank_variables(rank, size, port)
    variables["VMALLOC_RANK_PATH"] = json.dumps([one for one in sys.path if isinstance(one, str)])
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(num_threads))
    variables["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "0")
    return variables


def _launch(environments: Mapping[int, dict[str, str]], arguments: list[str]) -> SubprocessContext:
    """Start one process per rank, without what the launcher does beside that.

    Called on the main thread it would replace the handlers of SIGINT and SIGTERM, which are the
    user's; on another one it only warns that it does not.
    """
    from torch.distributed.elastic.multiprocessing import start_processes
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs, SubprocessContext

    class NoLogs(LogsSpecs):
        """No log files, and so no folder for them."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            return _no_logs(len(envs))

        @property
        def root_log_dir(self) -> str:
            return ""

    started: list[SubprocessContext] = []
    errors: list[Exception] = []

    def start() -> None:
        try:
            context = start_processes(
                name="vmalloc-rank",
                entrypoint=sys.executable,
                args={rank - 1: ("-c", _BOOT, *arguments) for rank in environments},
                envs={rank - 1: variables for rank, variables in environments.items()},
                logs_specs=NoLogs(),
            )
            assert isinstance(context, SubprocessContext)
            started.append(context)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start, name="vmalloc-rank-start")
    with _quiet_launcher():
        thread.start()
        thread.join()
    if errors:
        raise errors[0]
    return started[0]


def _no_logs(count: int) -> LogsDest:
    from torch.distributed.elastic.multiprocessing.api import LogsDest

    return LogsDest(
        stdouts=dict.fromkeys(range(count), ""),
        stderrs=dict.fromkeys(range(count), ""),
        error_files=dict.fromkeys(range(count), os.devnull),
    )


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep the launcher's warnings about what is meant here off the user's terminal."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger(_LAUNCHER)
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def _wait_exit(pid: int) -> int | None:
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:  # somebody else has waited for it
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _kill_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(pid, number)


def _process_state(pid: int) -> str:
    """The letter of ``/proc/PID/stat``, e.g. ``"T"`` for a stopped process; "" if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]

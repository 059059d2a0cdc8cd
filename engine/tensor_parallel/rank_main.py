"""The process of a rank other than 0: ``python -m vmalloc.engine.tensor_parallel.rank_main``.

Joins the ranks as the environment says (RANK, WORLD_SIZE, MASTER_PORT) and calls one function with
the channel to the others. What that function raises is reported to rank 0. The process never
outlives rank 0: it watches the process itself, because a death signal asked of the kernel comes
when the *thread* that started this process ends.

Owns: the process.  Thread-safety: one thread besides the main one, which only ends the process.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from ...errors import ConfigError
from ..errors import RankLostError, UnsupportedModelError
from .rank_channel import RankChannel
from .rank_join import announce, join_ranks, leave_ranks, report, visit_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

START_TIMEOUT_S = 300.0
"""Longest wait for the other processes to load torch, on a machine that is busy."""

ORPHAN_GRACE_S = 2.0
"""How long a rank may take to end by itself once rank 0 is gone."""

_POLL_S = 0.5
EXIT_FAILED, EXIT_ORPHANED = 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the rank; the exit code is 0 only if its function returned."""
    options = _parse(arguments)
    # The terminal's Ctrl-C is for rank 0, which tells the others what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(
        target=_end_with, args=(options.parent,), name="vmalloc-rank-0-watch", daemon=True
    ).start()
    rank, size, port = (_variable(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = visit_store(port, START_TIMEOUT_S)
    code = 0
    try:
        _run(store, rank, size, options)
    except BaseException as error:
        code = EXIT_FAILED
        _tell(store, rank, error, options.parent)
    return code


def _run(store: Store, rank: int, size: int, options: argparse.Namespace) -> None:
    function = find_entry(options.entry)
    announce(store, rank)
    channel = join_ranks(store, rank, size, device=options.device, timeout_s=options.timeout_s)
    function(channel)
    leave_ranks(channel)


def find_entry(entry: str) -> Callable[[RankChannel], object]:
    """The function that ``"module:function"`` names."""
    module, _, name = entry.partition(":")
    function = getattr(import_module(module), name, None)
    if not callable(function):
        raise ConfigError(f"entry is {entry!r}; {module} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _tell(store: Store, rank: int, error: BaseException, parent: int) -> None:
    """Tell rank 0 what ended this one; and the terminal what rank 0 does not find out by itself."""
    known = (ConfigError, RankLostError, UnsupportedModelError)
    if os.getppid() == parent and not isinstance(error, known):
        traceback.print_exception(error, file=sys.stderr)
    with contextlib.suppress(RuntimeError):  # rank 0 is gone, and the store with it
        report(store, rank, error)


def _leave(code: int) -> NoReturn:
    """End the process without unloading its modules.

    That takes a second, and the destructors of broken process groups may wait for ever.
    """
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """End this process when the process ``parent``, which started it, has ended."""
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:  # gone already, or a kernel that has no such descriptors
        descriptor = None
    if descriptor is not None and os.getppid() == parent:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll()
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(EXIT_ORPHANED)


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise SystemExit(f"{name} is {value!r} in the environment; it must be a number")
    return int(value)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rank_main", description=__doc__)
    parser.add_argument("--entry", required=True, help="module:function, called with the channel")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--timeout-s", type=float, required=True, help="how far ranks may be apart")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process id of rank 0")
    return parser.parse_args(arguments)


def run() -> NoReturn:
    """``main``, and the end of the process."""
    _leave(main())


if __name__ == "__main__":
    run()

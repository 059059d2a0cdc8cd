"""Groups of ranks for tests, and what they may not leave behind."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vmalloc.engine.tensor_parallel.rank_group import RankGroup

ENTRY = "tests.engine.rank_entries:obey"
LIMIT_S = 10.0


def start(size: int, **settings: Any) -> RankGroup:
    return RankGroup.start(size, device="cpu", **{"entry": ENTRY, "timeout_s": 60.0, **settings})


def order(group: RankGroup, word: str, argument: Any = None) -> None:
    group.channel.send(json.dumps([word, argument]).encode())


def pids_of(group: RankGroup) -> dict[int, int]:
    assert group._processes is not None
    return dict(group._processes.pids)


def process_state(pid: int) -> str:
    """The state letter; "Z" or "" for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_until(condition: Callable[[], object], seconds: float = LIMIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def open_files(pid: int | str = "self") -> list[str]:
    """What the process's descriptors are, e.g. ``socket:[123]``."""
    names = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(path))
        except OSError:
            continue  # closed meanwhile, like the listing's own
    return names


def listeners(pid: int | str) -> list[str]:
    """Local addresses, in the kernel's hexadecimal, on which the process listens."""
    sockets = {name[8:-1] for name in open_files(pid) if name.startswith("socket:")}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets]


def footprint() -> dict[str, Any]:
    """What a group may not leave behind in this process or on this host."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return {
        "children": children.read_text().split() if children.exists() else [],
        "sockets": sum(name.startswith("socket:") for name in open_files()),
        "listeners": len(listeners("self")),
        "files": len(open_files()),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "log folders": sorted(Path(tempfile.gettempdir()).glob("torchelastic_*")),
        "environment": sorted(one for one in os.environ.items() if "PYTEST" not in one[0]),
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("vmalloc-rank")],
        "torch threads": torch.get_num_threads(),
        "handlers": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "initialised": dist.is_initialized(),
    }


def assert_nothing_is_left(before: dict[str, Any], pids: dict[int, int]) -> None:
    """Sockets close on gloo's own threads, so soon rather than at once."""
    deadline = time.monotonic() + LIMIT_S
    while left := {name: now for name, now in footprint().items() if now != before.get(name, now)}:
        assert time.monotonic() < deadline, (left, {name: before[name] for name in left})
        time.sleep(0.01)
    assert not any(process_state(pid) for pid in pids.values())

"""Ranks that are killed, stopped, fail or lose rank 0: a typed error, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.engine import rank_entries
from tests.engine.ranks import (
    LIMIT_S,
    assert_nothing_is_left,
    footprint,
    order,
    pids_of,
    process_state,
    start,
    wait_until,
)
from vmalloc.engine.errors import RankLostError
from vmalloc.engine.tensor_parallel.rank_group import RankGroup
from vmalloc.engine.tensor_parallel.rank_join import host_store
from vmalloc.errors import ClosedError

ROOT = Path(__file__).resolve().parents[2]
BEHIND_S = 1.0
OWN_SCRIPT = """
import sys, threading
from tests.engine.ranks import order, pids_of, start
group = start(3)
print(*pids_of(group).values(), flush=True)
order(group, "compute", 2)  # rank 1 waits for the next order, rank 2 never gets there
threading.Event().wait()
"""


@pytest.fixture(scope="module", autouse=True)
def _lasting_files() -> None:
    """torch keeps a few descriptors after its first store; these are no group's."""
    from torch._C._distributed_c10d import TCPStore

    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def collective(group: RankGroup) -> None:
    """Rank 0's share of more sums than the others take part in."""
    for _ in range(3):
        dist.all_reduce(torch.ones(3))


def kill_soon(pid: int, number: signal.Signals) -> None:
    """Most likely once rank 0 waits for that process; right before is as good a case."""
    threading.Timer(0.2, os.kill, (pid, number)).start()


@pytest.fixture
def nothing_left() -> Iterator[dict[int, int]]:
    """Processes that a test puts in here must have ended, and all else be as before."""
    before = footprint()
    pids: dict[int, int] = {}
    yield pids
    assert_nothing_is_left(before, pids)


def test_a_rank_killed_in_a_collective(
    nothing_left: dict[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    with start(2) as group:
        nothing_left.update(pids_of(group))
        order(group, "sum", 2)
        order(group, "sleep", 1)
        started = time.monotonic()
        kill_soon(nothing_left[1], signal.SIGKILL)
        with pytest.raises(RuntimeError) as caught:
            collective(group)
        lost = group.explain(caught.value)
        assert lost.rank == 1
        assert lost.reason == "its process was killed by SIGKILL (9)"
        with pytest.raises(RankLostError, match=r"rank 1 was lost: .*SIGKILL"):
            group.check()
        group.close()
        assert time.monotonic() - started < LIMIT_S
        group.close()
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "rank 1 obeys\n"


def test_a_rank_killed_while_rank_0_waits_for_another(nothing_left: dict[int, int]) -> None:
    with start(3) as group:
        nothing_left.update(pids_of(group))
        order(group, "sleep", 1)
        order(group, "vote", [[1], [1]])
        started = time.monotonic()
        kill_soon(nothing_left[2], signal.SIGKILL)
        with pytest.raises(RankLostError) as caught:
            group.channel.least([1])
        assert group.explain(caught.value).rank == 2
        with pytest.raises(RankLostError, match="an earlier vote did not get through: the conn"):
            group.channel.send(b"")
        assert time.monotonic() - started < LIMIT_S


def test_a_stopped_rank_is_behind(nothing_left: dict[int, int]) -> None:
    with start(3, timeout_s=BEHIND_S) as group:
        nothing_left.update(pids_of(group))
        os.kill(nothing_left[2], signal.SIGSTOP)
        order(group, "vote", [[1], [1]])  # rank 1 gives up too
        with pytest.raises(RankLostError) as caught:
            group.channel.least([1])
        assert caught.value.rank == 2
        assert "it is behind: no vote from it within 1 s" in caught.value.reason
        explained = group.explain(caught.value)
        assert explained.rank == 2
        assert explained.reason.startswith("its process is stopped, and a rank may be 1 s behind")


def test_what_a_rank_raises_is_told(nothing_left: dict[int, int]) -> None:
    with start(2) as group:
        nothing_left.update(pids_of(group))
        order(group, "fail", "value 7; at most 3")
        with pytest.raises(RankLostError) as caught:
            group.channel.least([1])
        lost = group.explain(caught.value)
        assert lost.rank == 1
        assert lost.reason == "its process ended with exit code 1: ValueError: value 7; at most 3"


def test_a_rank_that_cannot_start(nothing_left: dict[int, int]) -> None:
    expected = "rank 1 was lost: .* exit code 1: ConfigError: entry is 'json:nothing'"
    with pytest.raises(RankLostError, match=expected):
        start(2, entry="json:nothing")
    assert not nothing_left


def test_ranks_that_are_told_to_stop_end_in_order(nothing_left: dict[int, int]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = start(2, port=port)
    assert group.port == port
    nothing_left.update(pids_of(group))
    order(group, "stop")
    assert group._processes is not None
    assert group._processes.wait_end(LIMIT_S)
    with pytest.raises(RankLostError, match="ended with exit code 0"):
        group.check()
    group.close()
    with pytest.raises(ClosedError):
        group.check()
    host_store(port, LIMIT_S)  # the port is free again


def test_ranks_end_with_rank_0() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWN_SCRIPT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as own:
        assert own.stdout is not None
        pids = [int(word) for word in own.stdout.readline().split()]
        assert len(pids) == 2
        assert all(process_state(pid) in "RSD" for pid in pids)
        own.kill()
        wait_until(lambda: all(process_state(pid) in ("", "Z") for pid in pids))
        assert own.stderr is not None
        assert sorted(own.stderr.read().splitlines()) == ["rank 1 obeys", "rank 2 obeys"]


def test_the_last_message_is_read_though_rank_0_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(rank_entries.LATE_FILE, str(tmp_path / "late"))
    with start(2, entry="tests.engine.rank_entries:read_late") as group:
        group.channel.send(b"stop")
    assert (tmp_path / "late").read_bytes() == b"stop"
    assert "Traceback" not in capfd.readouterr().err

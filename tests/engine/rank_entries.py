"""What the other ranks of the tests' groups do: orders of one word, and endless work."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vmalloc.engine.errors import RankMismatchError
from vmalloc.engine.tensor_parallel.agreement import agree
from vmalloc.engine.tensor_parallel.rank_channel import RankChannel

LATE_FILE = "VMALLOC_TEST_LATE_FILE"


def obey(channel: RankChannel) -> None:
    """Do what rank 0 says: ``[word, argument]`` as JSON."""
    print(f"rank {channel.rank} obeys")
    while True:
        word, argument = json.loads(channel.receive())
        if word == "stop":
            return
        _ORDERS[word](channel, argument)


def read_late(channel: RankChannel) -> None:
    """Read the last message when rank 0 has most likely left."""
    time.sleep(0.5)
    Path(os.environ[LATE_FILE]).write_bytes(channel.receive())


def _vote(channel: RankChannel, values: list[list[int]]) -> None:
    try:
        least = channel.least(values[channel.rank - 1])
    except RankMismatchError as error:
        channel.gather(str(error).encode())
    else:
        channel.gather(json.dumps(least).encode())


def _agree(channel: RankChannel, facts: list[dict[str, Any]]) -> None:
    try:
        agree(channel, facts[channel.rank - 1])
    except RankMismatchError as error:
        channel.gather(f"{error.fact}|{error}".encode())
    else:
        channel.gather(b"agreed")


def _describe(channel: RankChannel, _argument: object) -> None:
    said = {
        "threads": torch.get_num_threads(),
        "spin": os.environ["GOMP_SPINCOUNT"],
        "session": os.getsid(0),
        "ignores_interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "rank": [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")],
        "device": str(channel.device),
    }
    channel.gather(json.dumps(said).encode())


def _sum(_channel: RankChannel, count: int) -> None:
    for _ in range(count):
        dist.all_reduce(torch.ones(3))


def _echo(channel: RankChannel, text: str) -> None:
    channel.gather(f"{channel.rank}{text}".encode())


def _compute(channel: RankChannel, rank: int) -> None:
    """Compute for ever in that rank."""
    product = torch.ones(200, 200)
    while channel.rank == rank:
        product = torch.nn.functional.normalize(product @ product)


def _fail(_channel: RankChannel, text: str) -> None:
    raise ValueError(text)


def _sleep(channel: RankChannel, rank: int) -> None:
    while channel.rank == rank:
        time.sleep(1.0)


_ORDERS = {
    "vote": _vote,
    "agree": _agree,
    "describe": _describe,
    "sum": _sum,
    "echo": _echo,
    "compute": _compute,
    "fail": _fail,
    "sleep": _sleep,
}

"""Joining and leaving the process groups of an engine's ranks, the same in every rank.

The default group carries the model's collectives, gloo on the CPU and NCCL on GPUs; a second one,
always gloo, carries the messages of ``RankChannel``. On GPUs this has not yet been run.

Owns: torch's default process group between ``join_ranks`` and ``leave_ranks``.
Thread-safety: one thread at a time; torch has one default group per process.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ...errors import ConfigError
from ..errors import RankLostError
from .rank_channel import RankChannel
from .rank_environment import LOOPBACK_ADDRESS, rank_environment

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

_BACKLOG = 128
_CONNECT_S = 60.0
"""Least time for the ranks to connect: that is no step, and the host is busiest then."""

_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "wait timeout after",
)
"""What gloo and the store say of a peer that is gone or behind."""
MAX_REPORT_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank said of the error that ended it: the exception's type and its text."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def check_devices(size: int, device: str) -> None:
    """Raise ``ConfigError`` unless ``size`` ranks have a device each."""
    if device == "cpu":
        return
    if device != "cuda":
        raise ConfigError(
            f"device is {device!r} with tensor_parallel_size {size}; it must be cpu or cuda, "
            "where rank r computes on cuda:r"
        )
    count = torch.cuda.device_count()
    if size > count:
        raise ConfigError(
            f"tensor_parallel_size is {size}; it must be at most the number of GPUs, {count}"
        )
    if not dist.is_nccl_available():
        raise ConfigError(
            f"device is 'cuda' with tensor_parallel_size {size}; torch {torch.__version__} has no "
            "NCCL, which the ranks' GPUs need"
        )


def rank_device(rank: int, device: str) -> torch.device:
    """The device of a rank, of those that ``check_devices`` accepts."""
    return torch.device("cpu") if device == "cpu" else torch.device("cuda", rank)


def host_store(port: int | None, timeout_s: float) -> TCPStore:
    """Rank 0's end of the store where the ranks meet; it listens on the loopback interface only.

    Raises ``ConfigError`` for a port that cannot be had. None: any that is free.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A port whose last connections are only fading away can be had again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK_ADDRESS, port or 0))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"tensor_parallel_port is {port}; it cannot be had on {LOOPBACK_ADDRESS}: "
            f"{error.strerror}"
        ) from error
    from torch._C._distributed_c10d import TCPStore

    bound = int(listener.getsockname()[1])
    return TCPStore(
        LOOPBACK_ADDRESS,
        bound,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # torch's own would listen on every interface
    )


def visit_store(port: int, timeout_s: float) -> TCPStore:
    """Another rank's end of that store."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        LOOPBACK_ADDRESS, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def announce(store: Store, rank: int) -> None:
    """Say that this rank has come."""
    store.set(f"here/{rank}", "")


def has_come(store: Store, rank: int) -> bool:
    """Whether that rank has come."""
    return bool(store.check([f"here/{rank}"]))


def report(store: Store, rank: int, error: BaseException) -> None:
    """Leave word of the error that ends this rank."""
    said = [type(error).__name__, str(error)[:MAX_REPORT_CHARS]]
    store.set(f"error/{rank}", json.dumps(said))


def read_report(store: Store, rank: int) -> RankReport | None:
    """What that rank said of its end, if anything."""
    key = f"error/{rank}"
    if not store.check([key]):
        return None
    kind, text = json.loads(store.get(key))
    return RankReport(str(kind), str(text))


def is_consequence(said: RankReport) -> bool:
    """Whether a rank ended because it lost another, or waited for it in vain."""
    return said.kind == RankLostError.__name__ or any(sign in said.text for sign in _SIGNS)


def join_ranks(store: Store, rank: int, size: int, *, device: str, timeout_s: float) -> RankChannel:
    """Make both process groups with the other ranks, which do the same now; all have, then."""
    where = rank_device(rank, device)
    connect_s = max(timeout_s, _CONNECT_S)
    timeout = timedelta(seconds=connect_s)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    with rank_environment(rank, size):
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=where if where.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    channel = RankChannel(control, device=where, timeout_s=connect_s)
    channel.least(())  # some may still be connecting to each other
    channel.timeout_s = timeout_s
    return channel


def abort_device_groups() -> None:
    """End what NCCL waits for on this process's GPU; gloo needs no help to notice a lost peer."""
    if not torch.cuda.is_available():
        return
    for group in list(dist.distributed_c10d._world.pg_names):
        try:
            backend = group._get_backend(torch.device("cuda"))
        except RuntimeError:  # a group without GPUs
            continue
        backend.abort()


def leave_ranks(channel: RankChannel | None) -> None:
    """Destroy the process groups of this process, and with them their sockets and threads."""
    if channel is not None:
        channel.close()
    if dist.is_initialized():
        dist.destroy_process_group()

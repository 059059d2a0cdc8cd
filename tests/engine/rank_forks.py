"""Runs a function in several processes that torch.distributed connects over gloo.

Owns: the processes, until they have ended.  Thread-safety: none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANK_TIMEOUT_S = 120.0
"""Only bounds a hang: what the tests run takes seconds."""


def run_on_ranks(size: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, size, *arguments)`` gave in each of ``size`` processes, by rank.

    ``work`` is a function at the top of a module; ``folder`` is empty and the ranks' own.
    """
    # One process imports torch and what else ``work`` needs; the ranks are its forks.
    mp.set_forkserver_preload([work.__module__])
    context: Any = mp.start_processes(
        _run,
        (size, work, str(folder), arguments),
        nprocs=size,
        join=False,
        start_method="forkserver",
    )
    try:
        deadline = time.monotonic() + RANK_TIMEOUT_S
        while not context.join(timeout=1.0):  # raises what a rank raised
            assert time.monotonic() < deadline, f"ranks ran for {RANK_TIMEOUT_S:g} seconds"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, size: int, work: Callable[..., Any], folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.path.join(folder, 'meeting')}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=RANK_TIMEOUT_S),
    )
    torch.save(work(rank, size, *arguments), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()

"""The environment variables by which libraries learn which rank a process is.

Owns: nothing lasting: what it sets it takes back.
Thread-safety: the environment belongs to the whole process; enter from one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"


def rank_variables(rank: int, size: int, port: int | None = None) -> dict[str, str]:
    """What ``torchrun`` would set on one host, with every socket on the loopback interface."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": LOOPBACK_ADDRESS,
        "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
        "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
        # On an error NCCL gives its communicators up; ending the process is not its business.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    }
    if port is not None:
        variables["MASTER_PORT"] = str(port)
    return variables


@contextmanager
def rank_environment(rank: int, size: int, port: int | None = None) -> Iterator[None]:
    """Inside, this process looks like rank ``rank`` of ``size`` to torch and transformers.

    Needed around whatever makes process groups (torch reads where to listen from the environment)
    and around ``from_pretrained(tp_plan="auto")``. Afterwards every variable is what it was.
    """
    variables = rank_variables(rank, size, port)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

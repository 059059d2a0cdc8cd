"""Applications of several replicas as their users start them: processes with a Ray in each."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from .process import DEADLINE_SECONDS, REPOSITORY, ServerProcess, wait_until

_READY = re.compile(r"replica pid=(\d+)\)\S* .*replica (\w+) is ready")


class ReplicasProcess(ServerProcess):
    """``vmalloc serve --replicas``, and who its replicas are."""

    def __init__(self, *flags: str, log_path: Path, **variables: str) -> None:
        prepare = partial(_set_variables, {**ray_variables(), **variables})
        super().__init__(*flags, log_path=log_path, waits=False, prepare=prepare)
        try:
            self._wait_until(lambda: "INFO    ready" in self.log, "all replicas are ready")
        except BaseException:
            self.kill()
            raise

    def pid_of(self, replica: str) -> int:
        """The process of a replica, by what it said when it was ready."""
        pids = {name: int(pid) for pid, name in _READY.findall(self.log)}
        return pids[replica]

    def replicas(self) -> list[str]:
        """Names of those that answer."""
        answer = self.http.get("/health").json()
        return [one["replica"] for one in answer["replicas"]]


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def ray_variables() -> dict[str, str]:
    """For a Ray that tells nobody, listens on the loopback interface and leaves no file at home."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": "local",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


@contextmanager
def serve_run(folder: Path, **args: Any) -> Iterator[str]:
    """``serve run`` on a config file with these arguments of the application; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    application = {"name": "default", "import_path": "vmalloc.server.ray:app", "args": args}
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    config, log_path = folder / "serve.yaml", folder / "serve-run.log"
    config.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **ray_variables()},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log_path.read_text()
            return _is_ready(url)

        wait_until(is_ready, "serve run serves")
        yield url
    finally:
        # Killed, it would leave its Ray behind.
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE_SECONDS)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    children: dict[int, set[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), set()).add(int(status.parent.name))
    found: set[int] = set()
    stack = [pid]
    while stack:
        for child in children.get(stack.pop(), ()):
            found.add(child)
            stack.append(child)
    return found

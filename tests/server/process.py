"""A real ``vmalloc serve`` process on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 120.0
END_SECONDS = 60.0


class ServerProcess:
    """The demo model served by a process of its own; ``with`` ends it, and it must end well.

    Args:
        arguments: further options of ``vmalloc serve``.

    Attributes:
        url: where it listens.
        log: what it wrote so far.
    """

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "vmalloc.cli", "serve", "--model", "demo", "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        self.log: list[str] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self._wait_for_url()
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.kill()
            return
        assert self.stop() == 0, "".join(self.log)

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 80

    def stop(self) -> int:
        """End it as an operator does; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(END_SECONDS)
        self._close()
        return code

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait(END_SECONDS)
        self._close()

    def _close(self) -> None:
        self._reader.join(END_SECONDS)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._news:
                self.log.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _wait_for_url(self) -> str:
        with self._news:
            self._news.wait_for(
                lambda: self._find_url() or self._process.poll() is not None, START_SECONDS
            )
            url = self._find_url()
        assert url is not None, "".join(self.log)
        return url

    def _find_url(self) -> str | None:
        found = re.search(r"listening on (http://[\w.:]+)", "".join(self.log))
        return None if found is None else found[1]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert self._process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.05)


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

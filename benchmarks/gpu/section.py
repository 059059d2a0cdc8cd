"""What every section of the GPU benchmark is given: its settings, its time, its result file.

Owns: the section's JSON file, written anew with every value so that a section that is stopped
leaves what it had.
Thread-safety: none; the section's main thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAND_IN = "stand-in"
"""Driver name in results that the strict stand-in libcuda gave, not a GPU."""


class Section:
    """One section while it runs.

    Args:
        name: as in ``plan.SECTIONS``.
        out: JSON file to write; None: keep nothing.
        dry_run: check everything that can be checked without a GPU; measure nothing.
        seconds: how long it may take.
        seed: of whatever is drawn.
    """

    def __init__(
        self,
        name: str,
        *,
        out: Path | None,
        dry_run: bool = False,
        seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.out = out
        self.dry_run = dry_run
        self.seed = seed
        self._end = time.monotonic() + seconds
        self._result: dict[str, Any] = {"driver": "none", "result": {}, "skipped": {}}
        self._write()

    @property
    def device(self) -> str:
        """Where tensors are: ``"cuda"``, in a dry run ``"cpu"``."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def result(self) -> dict[str, Any]:
        """What was put so far."""
        values: dict[str, Any] = self._result["result"]
        return values

    def put(self, key: str, value: Any) -> None:
        """Set ``result[key]``."""
        self.result[key] = value
        self._write()

    def add(self, key: str, row: Any) -> None:
        """Append to the list ``result[key]``."""
        self.result.setdefault(key, []).append(row)
        self._write()

    def skip(self, what: str, reason: str) -> None:
        """Say that ``what`` was left out, and why."""
        self._result["skipped"][what] = reason
        self._write()
        print(f"left out: {what}: {reason}", flush=True)

    def set_driver(self, name: str) -> None:
        """Say where the pages came from: ``"cuda"`` or ``STAND_IN``."""
        self._result["driver"] = name
        self._write()

    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; else ``what`` is noted as left out."""
        if self.left_s() >= seconds:
            return True
        self.skip(what, f"{self.left_s():.0f} s left, {seconds:.0f} s wanted")
        return False

    def fail(self, error: str) -> None:
        """Note what ended the section early."""
        self._result["error"] = error
        self._write()

    def _write(self) -> None:
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self._result, indent=1) + "\n")
        os.replace(part, self.out)


def run_section(name: str, main: Callable[[Section], None]) -> None:
    """Read the command line that the orchestrator wrote, and run a section's ``main``."""
    parser = argparse.ArgumentParser(description=f"Section {name} of the GPU benchmark.")
    parser.add_argument("--out", type=Path, default=Path(f"build/gpu/gpu_{name}.json"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    section = Section(
        name, out=given.out, dry_run=given.dry_run, seconds=given.seconds, seed=given.seed
    )
    try:
        main(section)
    except BaseException as error:
        section.fail(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        raise SystemExit(1) from error
    print("dry run: ok" if section.dry_run else "ok", flush=True)

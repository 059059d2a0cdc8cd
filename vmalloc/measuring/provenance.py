"""Where a measured result comes from: commit, machine, versions, command.

Owns: nothing.  Thread-safety: reads the system only.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout; of an installed package, the folder it is installed in."""

STAMP = ROOT / ".gpu" / "commit"
"""Names the commit where the tree is a copy without git."""


def provenance(
    seed: int, packages: Sequence[str] = ("vmalloc", "torch", "numpy")
) -> dict[str, Any]:
    """What somebody needs to run the same thing again."""
    return {
        "command": _command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "has_local_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "seed": seed,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the lowest and highest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result where ``--json`` says, if it says."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _command() -> str:
    """What was typed; the console script by its name, a script by its place in the checkout."""
    name = Path(sys.argv[0]).name
    program = ["vmalloc"] if name in ("vmalloc", "cli.py") else ["python", _relative(sys.argv[0])]
    return shlex.join([*program, *sys.argv[1:]])


def _relative(path: str) -> str:
    try:
        return str(Path(path).resolve().relative_to(ROOT))
    except ValueError:
        return Path(path).name


def _commit() -> str:
    """What git says, else what the stamp says, else ``"unknown"``."""
    commit = _git("rev-parse", "HEAD")
    if not commit and STAMP.exists():
        commit = STAMP.read_text().strip()
    return commit or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():  # else git may find the repository of somebody else
        return ""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")

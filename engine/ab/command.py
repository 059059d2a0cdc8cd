"""What ``vmalloc ab`` does: compare, show, and write the files.

Owns: nothing.  Thread-safety: none; one process, one comparison.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from ...errors import ConfigError
from ...measuring.provenance import provenance
from .experiment import ABSettings, run_experiment
from .page import NO_PLOTS, has_plots, render_page
from .summary import summarize
from .terminal import ABProgress, ab_report

_NUMBERS = re.compile(r"\[\s+([-+.\w]+(?:,\s+[-+.\w]+)*)\s+\]")

PACKAGES = ("vmalloc", "torch", "transformers", "numpy")


def compare_backends(settings: ABSettings, json_file: Path, html_file: Path) -> bool:
    """Run a comparison and report it everywhere; whether all outputs were equal.

    Raises ``ConfigError`` before anything runs if a file cannot be written. What breaks a
    comparison off, Ctrl-C too, is raised once what was measured until then is reported.
    """
    for path in (json_file, html_file):
        _check_writable(path)
    if json_file.resolve() == html_file.resolve():
        raise ConfigError(f"output is {str(json_file)!r} twice; name two files")
    started = provenance(settings.seed, PACKAGES)
    with ABProgress(settings.num_runs) as progress:
        result = run_experiment(settings, before_run=progress.next)
    summary = summarize(result, started)
    console = Console()
    _write(json_file, dump_summary(summary))
    console.print(ab_report(summary, width=console.width))
    _write(html_file, render_page(summary))
    if not has_plots():
        Console(stderr=True).print(NO_PLOTS, style="yellow", markup=False)
    console.print(f"Wrote {json_file} and {html_file}.", style="dim", highlight=False, markup=False)
    if result.error is not None:
        raise result.error
    return result.equality.is_equal


def dump_summary(summary: dict[str, Any]) -> str:
    """JSON to read and to compare by line; a list of numbers is one line."""
    text = json.dumps(summary, indent=1)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _check_writable(path: Path) -> None:
    """Find out now what would otherwise be found out after minutes of work."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"output is {str(path)!r}; it is a folder")
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"output is {str(path)!r}; nothing can be written there")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output is {str(path)!r}; it cannot be written: {error}") from error

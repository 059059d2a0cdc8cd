"""What ``vmalloc ab`` does: compare, show, and write the files.

Owns: nothing.  Thread-safety: none; one process, one comparison.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ...errors import ConfigError
from ...measuring.provenance import provenance
from .experiment import ABSettings, run_experiment
from .page import NO_PLOTS, has_plots, render_page
from .summary import summarize
from .terminal import ABProgress, ab_report

PACKAGES = ("vmalloc", "torch", "transformers", "numpy")


def compare_backends(settings: ABSettings, json_file: Path, html_file: Path) -> bool:
    """Run a comparison and report it everywhere; whether all outputs were equal.

    Raises ``ConfigError`` before anything runs if a file cannot be written.
    """
    for path in (json_file, html_file):
        _check_writable(path)
    started = provenance(settings.seed, PACKAGES)
    with ABProgress(settings.num_runs) as progress:
        result = run_experiment(settings, before_run=progress.next)
    summary = summarize(result, started)
    console = Console()
    console.print(ab_report(summary, width=console.width))
    json_file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    html_file.write_text(render_page(summary), encoding="utf-8")
    if not has_plots():
        Console(stderr=True).print(NO_PLOTS, style="yellow", markup=False)
    console.print(f"Wrote {json_file} and {html_file}.", style="dim", highlight=False)
    return result.equality.is_equal


def _check_writable(path: Path) -> None:
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"output is {str(path)!r}; it cannot be written: {error}") from error

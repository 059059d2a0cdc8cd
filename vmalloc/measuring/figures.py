"""One look for all figures, and SVG files that stay the same while the numbers do.

Owns: matplotlib's settings.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLORS = {
    "virtual": "#2f81f7",
    "virtual, net": "#9ecbff",
    "paged": "#d4813a",
    "token states": "#2f81f7",
    "reserved, filled later": "#9ecbff",
    "never filled": "#d0d7de",
}
LENGTH_COLORS = ["#2f81f7", "#d4813a", "#1a7f37"]

mpl.rcParams.update(
    {
        "svg.hashsalt": "vmalloc",  # element ids that do not change from run to run
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#57606a",
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
)


def new_panels(
    rows: int, columns: int, *, width: float, height: float, **settings: Any
) -> tuple[Figure, list[Any]]:
    """A figure of ``width`` x ``height`` inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    return figure, list(axes.ravel())


def save_figure(figure: Figure, path: Path) -> None:
    """Write it in the format that the name's ending says; SVG files carry no date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, dpi=150)

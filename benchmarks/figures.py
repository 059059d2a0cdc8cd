"""All figures of the docs again, from the committed results: nothing is measured.

    python benchmarks/figures.py                    # docs/figures; `make bench-docs`

Each result file below ``benchmarks/results`` names what draws it; of those that are not there, no
figure is drawn. The same results, matplotlib and fonts give the same bytes, so a figure that git
calls changed was drawn from other numbers. One alone: ``--redraw RESULT.json --figure FILE.svg`` of
the benchmark.

Owns: docs/figures.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vmalloc.measuring.provenance import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FOLDER = ROOT / "docs" / "figures"


def draw_hf_cache(file: Path, folder: Path) -> None:
    import hf_cache

    hf_cache.draw_figure(_read(file)["rows"], folder / "hf-cache.svg")


def draw_preemption(file: Path, folder: Path) -> None:
    import preemption

    preemption.draw_figure(_read(file)["rows"], folder / "preemption.svg")


def draw_sharing(file: Path, folder: Path) -> None:
    import sharing

    sharing.draw_figure(_read(file), folder / "sharing.svg")


def draw_waste(file: Path, folder: Path) -> None:
    import waste

    waste.draw_figure(_read(file), folder / "waste.svg")


def draw_ab(file: Path, folder: Path) -> None:
    from vmalloc.engine.ab import plots

    plots.main(file, folder / "ab.svg")


def draw_peers(file: Path, folder: Path) -> None:
    from contest.report import draw_figure

    draw_figure(_read(file)["rows"], folder / f"{file.stem}.svg")


def draw_simulate(file: Path, folder: Path) -> None:
    from simulation.plots import PLOTS

    for name, study in _read(file).items():
        if name in PLOTS:
            PLOTS[name](study["rows"], folder / f"simulate-{name}.svg")


def draw_tp(file: Path, folder: Path) -> None:
    import tp

    tp.draw_figure(_read(file)["rows"], folder / "tp.svg")


def draw_gpu(file: Path, folder: Path) -> None:
    from gpu.plots import draw_all

    draw_all(_read(file), folder)


DRAWN: dict[str, Callable[[Path, Path], None]] = {
    "hf-cache.json": draw_hf_cache,
    "preemption.json": draw_preemption,
    "sharing.json": draw_sharing,
    "waste.json": draw_waste,
    "ab.json": draw_ab,
    "peers*.json": draw_peers,
    "simulate*.json": draw_simulate,
    "tp.json": draw_tp,
    "gpu_results.json": draw_gpu,
}


def _read(file: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def draw_figures(results: Path, folder: Path) -> list[str]:
    """Draw what there are results for; the names of those that are missing."""
    missing = []
    for pattern, draw in DRAWN.items():
        files = sorted(results.glob(pattern))
        for file in files:
            draw(file, folder)
        if not files:
            missing.append(pattern)
    return missing


def main(
    results: Annotated[Path, typer.Option(help="Where the results are.")] = RESULTS,
    folder: Annotated[Path, typer.Option(help="Where the figures go.")] = FOLDER,
) -> None:
    """Draw all figures of the docs again; see the head of this file."""
    before = {file.name: file.read_bytes() for file in folder.glob("*.svg")}
    missing = draw_figures(results, folder)
    for file in sorted(folder.glob("*.svg")):
        is_same = before.get(file.name) == file.read_bytes()
        print(f"{file}: {'as before' if is_same else 'changed'}")
    for pattern in missing:
        print(f"{results / pattern}: not there, nothing drawn")


if __name__ == "__main__":
    typer.run(main)

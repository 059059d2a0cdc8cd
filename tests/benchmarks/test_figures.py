"""Figures of the docs: each is drawn from a committed result, and is what that result gives."""

import re
from importlib.metadata import version

import figures
import hf_cache
import matplotlib as mpl
import preemption
import pytest
import sharing
import waste
from matplotlib import font_manager

SHOWN = re.compile(r"!\[[^\]]*\]\((?:docs/)?figures/([^)]+)\)")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
ELEMENT_ID = re.compile(r"\b[a-z][0-9a-f]{10}\b")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    figures.draw_figures(figures.RESULTS, folder)
    return folder


def names_of(folder):
    return {file.name for file in folder.glob("*.svg")}


def pinned_matplotlib():
    (pin,) = re.findall(
        r"^matplotlib==(\S+)$", (figures.ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    return pin


def test_every_figure_that_the_docs_show_is_drawn_from_a_committed_result(drawn):
    pages = [figures.ROOT / "README.md", *sorted((figures.ROOT / "docs").glob("*.md"))]
    shown = {name for page in pages for name in SHOWN.findall(page.read_text())}
    assert "waste.svg" in shown
    assert shown <= names_of(drawn)


def test_every_committed_figure_is_what_its_result_gives(drawn):
    if version("matplotlib") != pinned_matplotlib():
        pytest.skip(f"drawn with matplotlib {pinned_matplotlib()}; here is {version('matplotlib')}")
    font = font_manager.findfont(font_manager.FontProperties(family=mpl.rcParams["font.family"]))
    if "DejaVuSans" not in font:
        pytest.skip(f"drawn with matplotlib's own DejaVu Sans; {font} has other widths")
    assert names_of(figures.FOLDER) == names_of(drawn)
    for name in sorted(names_of(drawn)):
        committed = ELEMENT_ID.sub("id", (figures.FOLDER / name).read_text())
        again = ELEMENT_ID.sub("id", (drawn / name).read_text())
        assert NUMBER.sub("#", again) == NUMBER.sub("#", committed), name
        # Another CPU may round the last digit of a place otherwise.
        places = [float(number) for number in NUMBER.findall(committed)]
        assert [float(number) for number in NUMBER.findall(again)] == pytest.approx(
            places, rel=1e-6, abs=1e-3
        ), name


def test_drawing_again_gives_the_same_bytes(drawn, tmp_path):
    figures.draw_figures(figures.RESULTS, tmp_path)
    assert names_of(tmp_path) == names_of(drawn)
    for name in names_of(drawn):
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes(), name


@pytest.mark.parametrize("script", [hf_cache, preemption, sharing, waste])
def test_a_benchmark_draws_an_earlier_result_and_measures_nothing(script, drawn, tmp_path, capsys):
    name = script.__name__.replace("_", "-")
    figure = tmp_path / f"{name}.svg"
    script.main(redraw=figures.RESULTS / f"{name}.json", figure=figure)
    assert figure.read_bytes() == (drawn / figure.name).read_bytes()
    assert "│" in capsys.readouterr().out  # the tables, too


def test_what_has_no_result_yet_is_named(tmp_path):
    assert figures.draw_figures(tmp_path, tmp_path / "figures") == list(figures.DRAWN)
    assert not (tmp_path / "figures").exists()

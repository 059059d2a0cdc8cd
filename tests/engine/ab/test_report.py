"""The JSON, the page and the terminal say the same, and the page needs nothing but itself."""

import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.chromium import launched_chromium
from vmalloc.engine.ab import page
from vmalloc.engine.ab.command import dump_summary
from vmalloc.engine.ab.metrics import HEADLINES, METRICS
from vmalloc.engine.ab.page import render_page
from vmalloc.engine.ab.summary import summarize
from vmalloc.engine.ab.terminal import ab_report
from vmalloc.measuring.provenance import provenance


@pytest.fixture(scope="module")
def summary(result):
    return json.loads(json.dumps(summarize(result, provenance(0, ("torch",)))))


@pytest.fixture(scope="module")
def html(summary):
    pytest.importorskip("matplotlib", reason="pictures need vmalloc[bench]")
    return render_page(summary)


class Rows(HTMLParser):
    """Texts of the cells of every table row, by the section it stands in."""

    def __init__(self):
        super().__init__()
        self.rows, self.section, self.tags = {}, "", []

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self.section = dict(attributes).get("id", "")
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        self.tags.append(tag)

    def handle_endtag(self, tag):
        while self.tags.pop() != tag:
            pass

    def handle_data(self, text):
        if "tr" in self.tags and text.strip():
            self.rows[self.section][-1].append(text.strip())


def numbers(line):
    """All texts that a line of the JSON table has for its numbers."""
    cells = [*line["values"].values(), *line["ratios"].values()]
    return [text for cell in cells for text in (cell["text"], cell["spread_text"]) if text]


def test_the_page_has_every_number_of_the_json_table_in_its_row(summary, html):
    parser = Rows()
    parser.feed(html)
    words = {metric.name: metric.words for metric in METRICS}
    for workload in summary["workloads"]:
        section = page._anchor(workload)
        rows = {cells[0].split(",")[0]: cells for cells in parser.rows[section] if cells}
        whole = {cells[0]: cells for cells in parser.rows[section] if cells}
        assert len(workload["table"]) == len(METRICS)
        for line in workload["table"]:
            name = words[line["metric"]]
            cells = next(
                cells for key, cells in whole.items() if key in (name, f"{name}, ms", f"{name}, us")
            )
            assert [text for text in cells[1:] if text not in VERDICTS] == numbers(line)
        assert rows


VERDICTS = {"tie", "virtual ahead", "paged ahead", "max_length ahead"}


def test_json_numbers_are_the_runs(summary, result):
    for workload, measured in zip(summary["workloads"], result.workloads, strict=True):
        for line in workload["table"]:
            for arm, value in line["values"].items():
                runs = [run.values[line["metric"]] for run in measured.runs[arm]]
                assert value["runs"] == runs
                if None not in runs:
                    assert value["low"] == min(runs)
                    assert value["high"] == max(runs)
                    assert value["median"] == pytest.approx(sum(runs) / 2)


def test_the_json_file_has_a_line_for_each_list_of_numbers(summary):
    text = dump_summary(summary)
    assert json.loads(text) == summary
    runs = summary["workloads"][0]["table"][0]["values"]["paged"]["runs"]
    assert f'"runs": {json.dumps(runs)}' in text


def test_the_overview_can_be_drawn_from_the_json_file(summary, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need vmalloc[bench]")
    from vmalloc.engine.ab import plots

    (tmp_path / "ab.json").write_text(dump_summary(summary))
    plots.main(tmp_path / "ab.json", tmp_path / "ab.svg")
    assert "virtual ahead" in (tmp_path / "ab.svg").read_text()


def test_wins_ties_and_losses_are_counted_and_shown(summary, html):
    for other, score in summary["score"].items():
        verdicts = [
            line["ratios"][other]["verdict"]
            for workload in summary["workloads"]
            for line in workload["table"]
        ]
        for verdict, count in score.items():
            assert verdicts.count(verdict) == count
        assert sum(score.values()) > 0
        assert f"{score['better']} virtual ahead" in html
        assert f"{score['tie']} ties" in html
        assert f"{score['worse']} {other} ahead" in html


def test_the_page_says_where_it_comes_from(summary, html):
    text = unescape(html)
    for value in (summary["provenance"]["commit"], summary["provenance"]["command"]):
        assert value in text
    assert summary["equality"]["words"] in text
    assert "two & three.csv" in text
    assert "With 2 runs a side, 33.3% of equals would look ahead by chance." in text


def test_the_page_refers_to_nothing_outside(html):
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b", html)
    assert "@import" not in html
    for target in re.findall(r"""(?:href|src)=["']([^"']*)""", html):
        assert target.startswith("#"), target
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#"), target
    anchors = set(re.findall(r"""<a href=["']#([^"']*)""", html))
    assert anchors <= set(re.findall(r'id="([^"]*)"', html))


def test_pictures_have_no_colour_that_the_page_cannot_change_for_the_dark(summary, html):
    assert html.count("<svg") == len(summary["score"]) + 4 * len(summary["workloads"])
    assert "#000000" not in html
    assert "var(--muted)" in html


def test_without_matplotlib_there_are_tables_and_a_word_why(summary, monkeypatch):
    monkeypatch.setattr(page, "has_plots", lambda: False)
    html = page.render_page(summary)
    assert "<svg" not in html
    assert "pip install &#x27;vmalloc[bench]&#x27;" in html
    parser = Rows()
    parser.feed(html)
    assert sum(map(len, parser.rows.values())) > len(METRICS) * len(summary["workloads"])


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_every_headline_and_what_it_comes_to(summary, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(ab_report(summary, width=width))
    text = console.export_text()
    assert "…" not in text  # nothing is cut
    for workload in summary["workloads"]:
        assert workload["name"] in text
        lines = {line["metric"]: line for line in workload["table"]}
        for metric in HEADLINES:
            assert metric.words in text
            for cell in lines[metric.name]["values"].values():
                assert cell["text"] in text
                assert width < 200 or cell["spread_text"] in text
    flat = " ".join(text.split())
    assert "Outputs equal" in flat
    for score in summary["score"].values():
        words = f"{score['better']} better, {score['tie']} ties, {score['worse']} worse"
        assert words in flat


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_from_disk_and_fits_the_screen(html, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    path.write_text(html)
    requests, complaints = [], []
    with launched_chromium() as browser:
        shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        shown.on("request", lambda request: requests.append(request.url))
        shown.on("console", lambda message: complaints.append(message.text))
        shown.goto(path.as_uri())
        overflow = shown.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        colors = shown.evaluate(
            "[document.body, document.querySelector('figure svg text')].map("
            "(one, idx) => getComputedStyle(one)[idx ? 'fill' : 'backgroundColor'])"
        )
    assert overflow == 0
    assert (requests, complaints) == ([path.as_uri()], [])
    paper, ink = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (paper < 200 and ink > 500) if scheme == "dark" else (paper > 700 and ink < 200)

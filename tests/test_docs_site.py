"""The docs' site: links lead where they do in the repository, and nothing comes from elsewhere.

Owns: nothing.  Thread-safety: none; each test has a folder of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from scripts import docs_site

FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class References(HTMLParser):
    """What a page loads by itself, and where its links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (target := values.get(FETCHED.get(tag, ""))) is not None:
            self.fetched.append(target)
        if tag == "a" and (target := values.get("href")) is not None:
            self.links.append(target)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of a few files that link to each other."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.py").write_text("print(1)\n")
    (tmp_path / "docs" / "use.md").write_text(
        "[run](../runs/run.py) [all](../runs) [home](../README.md#top) [far](https://a.b/c)\n"
        "`[code](nowhere.md)`\n\n```\n[code](nowhere.md)\n```\n"
    )
    (tmp_path / "README.md").write_text("# Top\n[use](docs/use.md) [rules](CONTRIBUTING.md)\n")
    (tmp_path / "CONTRIBUTING.md").write_text("[use](docs/use.md#top)\n")
    (tmp_path / "CHANGELOG.md").write_text("first\n")
    return tmp_path


def test_links_follow_their_files_into_the_site(repository: Path) -> None:
    pages = {name: data.decode() for name, data in docs_site.pages(repository).items()}
    assert set(pages) == {
        "index.md",
        "use.md",
        "source/CONTRIBUTING.md",
        "source/CHANGELOG.md",
        "source/runs.md",
        "source/runs/run.py.md",
    }
    assert "[use](use.md) [rules](source/CONTRIBUTING.md)" in pages["index.md"]
    assert "[use](../use.md#top)" in pages["source/CONTRIBUTING.md"]
    assert "[run](source/runs/run.py.md) [all](source/runs.md)" in pages["use.md"]
    assert "[home](index.md#top) [far](https://a.b/c)" in pages["use.md"]
    assert pages["use.md"].count("[code](nowhere.md)") == 2
    assert "[run.py](runs/run.py.md)" in pages["source/runs.md"]
    assert "print(1)" in pages["source/runs/run.py.md"]


def test_a_folder_of_docs_is_listed_and_its_files_keep_their_places(repository: Path) -> None:
    (repository / "docs" / "figures").mkdir()
    (repository / "docs" / "figures" / "a.svg").write_bytes(b"<svg/>")
    (repository / "CHANGELOG.md").write_text("[all](docs/figures)\n")
    pages = docs_site.pages(repository)
    assert pages["figures/a.svg"] == b"<svg/>"
    assert b"[all](docs/figures.md)" in pages["source/CHANGELOG.md"]
    assert b"[a.svg](../../figures/a.svg)" in pages["source/docs/figures.md"]


def test_a_link_to_nothing_is_named(repository: Path) -> None:
    (repository / "docs" / "use.md").write_text("[gone](../runs/gone.py)\n")
    with pytest.raises(docs_site.BrokenLinkError, match=r"docs/use.md links to ../runs/gone.py"):
        docs_site.pages(repository)


def test_a_link_to_what_is_no_text_is_named(repository: Path) -> None:
    (repository / "runs" / "run.py").write_bytes(b"\xff\xfe")
    with pytest.raises(docs_site.BrokenLinkError, match=r"runs/run.py is linked to and is not"):
        docs_site.pages(repository)


def test_the_site_builds_and_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="needs the docs extra: pip install 'vmalloc[docs]'")
    docs_site.gather(tmp_path / "build" / "docs")
    shutil.copy(docs_site.ROOT / "zensical.toml", tmp_path)
    subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, check=True
    )
    site = tmp_path / "build" / "site"
    built = sorted(site.rglob("*.html"))
    assert {"index.html", "operations.html", "benchmarks.html"} <= {page.name for page in built}
    for page in built:
        if page.name == "404.html":  # its links are from the root of wherever the site is
            continue
        references = References(page.read_text())
        assert references.fetched
        for target in [*references.fetched, *references.links]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert target not in references.fetched, f"{page.name} fetches {target}"
                continue
            file = page.parent / unquote(parts.path) if parts.path else page
            assert file.exists(), f"{page.relative_to(site)} links to {target}"

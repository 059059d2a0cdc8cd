"""The page's files: what is served, how it is cached, and that they need nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .process import REPOSITORY
from .running import RunningServer

PAGE = REPOSITORY / "server" / "page"
FILES = sorted(path.name for path in PAGE.iterdir())


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    running = RunningServer()
    yield running.http
    running.close()


@pytest.mark.parametrize("name", ["", *[f"page/{name}" for name in FILES]])
def test_a_file_is_sent_as_it_is(http: httpx.Client, name: str) -> None:
    response = http.get(f"/{name}")
    assert response.status_code == 200
    assert response.content == (PAGE / (Path(name).name or "index.html")).read_bytes()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "*" not in policy


def test_types(http: httpx.Client) -> None:
    types = {Path(name).suffix: http.get(f"/page/{name}").headers["content-type"] for name in FILES}
    assert types == {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
    }


def test_an_unchanged_file_is_not_sent_again(http: httpx.Client) -> None:
    first = http.get("/page/app.js")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for known in (tag, f'"other", W/{tag}'):
        again = http.get("/page/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert http.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert http.get("/page/theme.js").headers["etag"] != tag


def test_head(http: httpx.Client) -> None:
    response = http.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == (PAGE / "index.html").stat().st_size


@pytest.mark.parametrize("name", ["none.js", "..%2fapp.py", "%2e%2e/app.py", "index.html/x", ""])
def test_nothing_else_is_there(http: httpx.Client, name: str) -> None:
    response = http.get(f"/page/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_the_page_names_no_other_host_and_no_absolute_path() -> None:
    """So that it works behind a proxy, and without a network."""
    for name in FILES:
        text = (PAGE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\"//|'//|url\(", text), name
        assert not re.search(r"(?:href|src)=\"/|fetch\(\"/", text), name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name


def test_whatever_a_file_refers_to_is_there() -> None:
    html = (PAGE / "index.html").read_text()
    named = re.findall(r"(?:href|src)=\"page/([^\"]+)\"", html)
    for name in FILES:
        if name.endswith(".js"):
            named += re.findall(r"from \"\./([^\"]+)\"", (PAGE / name).read_text())
    assert {"app.js", "style.css", "feed.js"} <= set(named)
    assert set(named) | {"index.html"} == set(FILES)


def test_every_id_that_a_module_looks_up_is_on_the_page() -> None:
    ids = set(re.findall(r"\bid=\"([^\"]+)\"", (PAGE / "index.html").read_text()))
    for path in PAGE.glob("*.js"):
        wanted = set(re.findall(r"\bfind\(\"([^\"]+)\"\)", path.read_text()))
        assert wanted <= ids, path.name

"""The docs as a site: gathers its pages under ``build/docs`` and lets Zensical build them.

Markdown here is written to be read in the repository, so its links go to files: ``docs/swap-in.md``
from the README, ``../benchmarks/waste.py`` from a page. A site has no repository beside it: the
README becomes its first page, and every file outside docs that a page links to becomes a page below
``source/`` (Markdown as it is, a folder as a list of its files, anything else as a listing). Links
are rewritten to where their files went. One that leads nowhere ends the build by name, and so does
what the strict build of Zensical finds, anchors above all.

    python scripts/docs_site.py             # build/site
    python scripts/docs_site.py --serve     # http://localhost:8000, again whenever a file is saved

Owns: ``build/docs`` and ``build/site``.  Thread-safety: none; one process, one build.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
GATHERED = ROOT / "build" / "docs"
HOME = "README.md"
BESIDE_DOCS = (HOME, "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?P<text>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"^(```+|~~~+)[^\n]*\n.*?^\1\s*$|(?<!`)`[^`\n]+`", re.MULTILINE | re.DOTALL)
LANGUAGES = {".json": "json", ".py": "python", ".cpp": "cpp", ".inl": "cpp", ".h": "cpp"}
MAX_LISTING_BYTES = 100_000  # of a longer file the site has the start
POLL_S = 0.5


class BrokenLinkError(Exception):
    """A link to a file that is not there, or that is not text."""


def page_of(path: str) -> str:
    """Where the site has a file of the repository. Images and pages of docs keep their places."""
    if path == HOME:
        return "index.md"
    if is_in_docs(path):
        return posixpath.relpath(path, "docs")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def is_in_docs(path: str) -> bool:
    """Whether it is a file of docs; a folder there is listed like any other."""
    return path.startswith("docs/") and "." in posixpath.basename(path)


def resolve(path: str, target: str, root: Path = ROOT) -> str | None:
    """The file that a link in ``path`` means; None for a link that leaves the repository.

    Raises:
        BrokenLinkError: there is no such file.
    """
    if ":" in target:
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if found.startswith(("..", "/")) or not (root / found).exists():
        raise BrokenLinkError(f"{path} links to {target}, and there is no {found}")
    return found


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """``markdown`` with ``change`` applied to what is no code."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def rewrite_links(path: str, markdown: str, root: Path = ROOT) -> tuple[str, list[str]]:
    """A page as the site has it, and the files that it links to."""
    folder = posixpath.dirname(page_of(path)) or "."
    found: list[str] = []

    def rewrite(match: re.Match[str]) -> str:
        target = resolve(path, match["target"], root)
        if target is None:
            return match[0]
        found.append(target)
        link = posixpath.relpath(page_of(target), folder)
        return f"{match['text']}{link}{match['anchor'] or ''}"

    return outside_code(markdown, lambda text: LINK.sub(rewrite, text)), found


def markdown_of(path: str, root: Path = ROOT) -> str:
    """A page before its links are rewritten.

    Raises:
        BrokenLinkError: the file is not text.
    """
    file = root / path
    if path.endswith(".md"):
        return file.read_text()
    if file.is_dir():
        names = sorted(child.name for child in file.iterdir() if child.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({file.name}/{name})\n" for name in names)
    data = file.read_bytes()
    is_cut = len(data) > MAX_LISTING_BYTES
    try:
        text = data[:MAX_LISTING_BYTES].decode(errors="ignore" if is_cut else "strict")
    except UnicodeDecodeError as error:
        raise BrokenLinkError(f"{path} is linked to and is not text: {error}") from error
    note = f"The first {MAX_LISTING_BYTES:,} of {len(data):,} bytes.\n\n" if is_cut else ""
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {path}\n\n{note}~~~~~~ {language}\n{text}\n~~~~~~\n"


def pages(root: Path = ROOT) -> dict[str, bytes]:
    """Every file of the site before it is built, by its place: pages, and what lies in docs."""
    in_docs = [f"docs/{file.relative_to(root / 'docs')}" for file in (root / "docs").rglob("*.*")]
    queue = [*BESIDE_DOCS, *sorted(in_docs)]
    built = {}
    for path in queue:  # grows while it is walked
        if is_in_docs(path) and not path.endswith(".md"):
            built[page_of(path)] = (root / path).read_bytes()
            continue
        markdown = markdown_of(path, root)
        if path.endswith(".md") or (root / path).is_dir():
            markdown, found = rewrite_links(path, markdown, root)
            queue += [one for one in dict.fromkeys(found) if one not in queue]
        built[page_of(path)] = markdown.encode()
    return built


def gather(folder: Path = GATHERED) -> None:
    """Bring ``folder`` up to date; a file that has not changed is not written."""
    built = pages()
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        if str(file.relative_to(folder)) not in built:
            file.unlink()
    for name, data in built.items():
        file = folder / name
        if not file.exists() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def zensical(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "zensical", *arguments]


def serve() -> None:
    """Show the site until it is interrupted, with pages as they are in the repository now."""
    with subprocess.Popen(zensical("serve"), cwd=ROOT) as server:
        try:
            while server.poll() is None:
                time.sleep(POLL_S)
                try:
                    gather()
                except BrokenLinkError as error:
                    print(error, file=sys.stderr)
        except KeyboardInterrupt:
            server.terminate()


def main(
    is_served: Annotated[
        bool, typer.Option("--serve", help="Show it, and follow changes.")
    ] = False,
) -> None:
    """Build the site, or show it; see the head of this file."""
    try:
        gather()
    except BrokenLinkError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    if is_served:
        serve()
        return
    shutil.rmtree(ROOT / "build" / "site", ignore_errors=True)
    raise typer.Exit(subprocess.run(zensical("build", "--strict", "--clean"), cwd=ROOT).returncode)


if __name__ == "__main__":
    typer.run(main)

"""The page at ``/``: files of the package, sent as they are.

Owns: their contents.  Thread-safety: immutable once loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from .errors import ApiError

router = APIRouter(include_in_schema=False)

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    # Nothing but the page's own files, and requests to this server alone.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # Asked for anew each time, answered with 304: a new version is never mixed with an old one.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file: its bytes, its type, and a tag that changes with them."""

    content: bytes
    media_type: str
    etag: str


def _load() -> dict[str, PageFile]:
    files = {}
    for entry in resources.files(__package__).joinpath("page").iterdir():
        media_type = _TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = PageFile(content, media_type, etag)
    return files


FILES = _load()


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _send(request, FILES["index.html"])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(name: str, request: Request) -> Response:
    """A file of the page."""
    file = FILES.get(name)
    if file is None:
        raise ApiError(404, f"{request.url.path} is not a known path", code="not_found")
    return _send(request, file)


def _send(request: Request, file: PageFile) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    tags = [
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("if-none-match", "").split(",")
    ]
    if file.etag in tags:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)

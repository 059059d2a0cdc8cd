"""Reads page maps from a running server.

Owns: one HTTP client.  Thread-safety: none; one caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import httpx

from ..errors import ConfigError, VmallocError

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 30.0
"""The server says something every few seconds; after so long without a word it is gone."""

Frame = dict[str, Any]


class ServerUnreachableError(VmallocError):
    """Nothing answers there, or not any more."""


class PageMapClient:
    """A server's page maps.

    Args:
        url: where it is, e.g. ``"localhost:8000"`` or ``"https://host/prefix"``.
        api_key: sent as Bearer token.

    Raises ``ConfigError`` for a URL that can be none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = read_url(url)
        self._client = httpx.Client(
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
        )

    def frame(self) -> Frame:
        """The page map now.

        Raises:
            ServerUnreachableError: nobody answers.
            VmallocError: the server refuses; the text says why, and what to do about it.
        """
        try:
            response = self._client.get(f"{self.url}/page-map")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(response)
        return self._read(response.text)

    def frames(self) -> Iterator[tuple[str, Frame]]:
        """("frame", page map) and ("state", why there is none) as they come, until the stream ends.

        Raises as ``frame`` does.
        """
        try:
            with self._client.stream("GET", f"{self.url}/page-map/events") as response:
                if not response.is_success:
                    response.read()
                self._check(response)
                kind, data = "frame", ""
                for line in response.iter_lines():
                    if line.startswith("event:"):
                        kind = line.removeprefix("event:").strip()
                    elif line.startswith("data:"):
                        data = line.removeprefix("data:")
                    elif not line and data:
                        yield kind, self._read(data)
                        kind, data = "frame", ""
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._client.close()

    def __enter__(self) -> PageMapClient:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _unreachable(self, error: httpx.HTTPError) -> ServerUnreachableError:
        reason = str(error) or type(error).__name__
        return ServerUnreachableError(
            f"nothing answers at {self.url}: {reason}; is `vmalloc serve` running there?"
        )

    def _check(self, response: httpx.Response) -> None:
        """Raise for a response that is no success."""
        if response.is_success:
            return
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = response.reason_phrase
        if response.status_code == 401:
            raise VmallocError(f"{self.url} refuses: {message}; give it with --api-key")
        if response.status_code == 404:
            raise VmallocError(f"{self.url} has no page map; it is no vmalloc server")
        raise VmallocError(f"{self.url} answers {response.status_code}: {message}")

    def _read(self, text: str) -> Frame:
        try:
            frame = json.loads(text)
        except ValueError as error:
            raise VmallocError(f"{self.url} has no page map: its answer is not JSON") from error
        if not isinstance(frame, dict):
            raise VmallocError(f"{self.url} has no page map; it is no vmalloc server")
        return frame


def read_url(text: str) -> str:
    """``"localhost:8000/"`` -> ``"http://localhost:8000"``. Raises ``ConfigError``."""
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
    except httpx.InvalidURL as error:
        raise ConfigError(f"url is {text!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"url is {text!r}; it must be like http://localhost:8000")
    return str(url.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1")

"""schemathesis reads the API description and tries to prove the server a liar."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.server.process import ServerProcess

# Not asked: whether all that the types allow is accepted, as fields may contradict each other
# (``beam_width`` without ``use_beam_search`` is 400, by design); and whether a method that a path
# does not have is 405, as a closed path says 401 or 403 first.
CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "missing_required_header",
    ]
)


def explore(server: ServerProcess, folder: Path, *arguments: str) -> str:
    """30 generated examples of every operation, the same ones every time; what it says."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    options = ["--checks", CHECKS, "--max-examples", "30", "--generation-deterministic"]
    options += ["--phases", "examples,fuzzing", "--continue-on-failure", "--no-color"]
    options += ["--request-timeout", "60"]
    result = subprocess.run(
        [*command, *options, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr
    return result.stdout


def test_every_operation_does_what_it_declares(
    shared_server: ServerProcess, tmp_path: Path
) -> None:
    told = explore(shared_server, tmp_path)
    paths = shared_server.http.get("/openapi.json").json()["paths"]
    num_operations = sum(len(methods) for methods in paths.values())
    assert "/v1/completions" in paths
    assert re.search(rf"Tested: +{num_operations}\b", told), told[-2000:]
    shared_server.wait_idle()


def test_the_administration_does_what_it_declares(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = start_server("--admin-api-key", "k", "--kv-cache-memory-bytes", "16777216")
    headers = ("-H", "Authorization: Bearer k")
    explore(server, tmp_path, *headers, "--include-path-regex", "^/(admin|abort)")
    for path, body in (("wake", None), ("resize", {"kv_cache_memory_bytes": 16777216})):
        response = server.http.post(
            f"/admin/{path}", headers={"authorization": "Bearer k"}, json=body
        )
        assert response.status_code == 200
    assert server.text()

"""docs/openai-api.md: its tables are the models', its examples run, its error codes are all.

Owns: nothing.  Thread-safety: none.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import DEADLINE_SECONDS, RunningServer
from vmalloc.server.protocol.base import field_classes
from vmalloc.server.protocol.chat import ChatRequest
from vmalloc.server.protocol.completions import CompletionRequest
from vmalloc.server.protocol.response_request import ResponseRequest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "openai-api.md").read_text(encoding="utf-8")
BASE = "http://127.0.0.1:8000"


def load_script() -> Any:
    path = ROOT / "scripts" / "list_api_fields.py"
    spec = importlib.util.spec_from_file_location("list_api_fields", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_tables_are_fresh() -> None:
    assert script.render(PAGE) == PAGE, f"run: {script.COMMAND}"


def test_every_field_has_its_class() -> None:
    """Read from the models themselves, not through their description."""
    rows = {
        cells[0].strip("` "): [cell.strip() for cell in cells[1:4]]
        for line in PAGE.split("<!-- fields: begin -->")[1].split("<!--")[0].splitlines()
        if (cells := line.strip("|").split("|"))[0].startswith(" `")
    }
    for column, model in enumerate((CompletionRequest, ChatRequest, ResponseRequest)):
        classes = field_classes(model)
        for name, kind in classes.items():
            assert rows[name][column] == kind, name
        for name, kinds in rows.items():
            if "." not in name and name not in classes:
                assert kinds[column] == script.UNKNOWN, name


def test_every_error_code_is_on_the_page() -> None:
    table = PAGE.split("## Errors")[1]
    listed = {
        code
        for line in table.splitlines()
        if line.startswith("| ")
        for code in re.findall(r"`([a-z_]+)`", line.split("|")[3])
    }
    sources = "".join(path.read_text() for path in sorted((ROOT / "server").rglob("*.py")))
    used = set(re.findall(r'code=f?"([a-z_]+)"', sources))
    used |= {"not_found", "method_not_allowed", "queue_timeout", "request_timeout", "engine_error"}
    states = ("starting", "draining", "sleeping", "stopped", "dead")
    used |= {f"engine_{state}" for state in states}
    assert listed - {"code"} == used


def test_every_status_of_a_body_is_described() -> None:
    api = script.description()
    for path, operations in api["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    for path in (*script.GENERATING, "/tokenize", "/detokenize"):
        responses = api["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "408", "413", "415", "503"} <= set(responses)
        error = responses["400"]["content"]["application/json"]["schema"]
        assert error == {"$ref": "#/components/schemas/ErrorBody"}
    assert "HTTPValidationError" not in api["components"]["schemas"]


@pytest.mark.parametrize("block", blocks("bash"))
def test_curl_examples(demo_server: RunningServer, block: str) -> None:
    done = subprocess.run(
        ["bash", "-c", block.replace(BASE, demo_server.url).replace("curl ", "curl --fail ")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    if "data: " in done.stdout:
        assert done.stdout.endswith("data: [DONE]\n\n")
    else:
        assert "error" not in json.loads(done.stdout)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples(
    demo_server: RunningServer, block: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(compile(block.replace(BASE, demo_server.url), "openai-api.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out.strip()


def test_the_error_example_is_what_is_sent(demo_server: RunningServer) -> None:
    expected = json.loads(blocks("json")[0])
    response = demo_server.post("/v1/completions", prompt="a", temperature=3)
    assert (response.status_code, response.json()) == (400, expected)

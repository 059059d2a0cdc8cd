"""docs/supported-models.md says what the load probe says, and its script fails in the open.

Owns: the script's module, loaded once.  Thread-safety: none.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import typer
from typer.testing import CliRunner

from vmalloc.engine.fused.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "supported-models.md"
PROMISED = (
    "LLaMA",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma 2",
    "Gemma 3",
    "Phi-3",
    "GPT-2",
    "OPT",
    "GPT-NeoX",
)
# One of each kind: plain, soft-capped, sinks, latent; and one refusal of each check.
SAMPLE = {
    "admitted": ("llama", "gemma2", "gpt-oss", "deepseek-v3", "gpt-bigcode", "olmo3"),
    "refused": ("bloom", "mamba", "bart", "t5", "llama4", "doge", "diffllama", "mimo-v2-flash"),
}


def load_script() -> Any:
    path = ROOT / "scripts" / "list_supported_models.py"
    spec = importlib.util.spec_from_file_location("list_supported_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()
BY_KEY = {architecture.key: architecture for architecture in script.ARCHITECTURES}


def page_names(heading: str) -> list[str]:
    """First column of the table under ``## heading (n)``."""
    found = re.search(rf"^## {heading} \((\d+)\)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert found is not None, f"the page has no section {heading}"
    rows = [line for line in found[2].splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]]
    assert len(names) == int(found[1])
    return names


@pytest.mark.parametrize(
    ("outcome", "key"), [(outcome, key) for outcome in SAMPLE for key in SAMPLE[outcome]]
)
def test_the_page_agrees_with_a_fresh_probe(outcome: str, key: str) -> None:
    verdict = script.examine(BY_KEY[key])
    assert verdict.outcome == outcome, verdict.reason
    assert verdict.architecture.name in page_names(outcome.capitalize())


def test_every_architecture_is_on_the_page_once() -> None:
    sections = re.findall(r"^## (.+) \(", PAGE.read_text(), re.M)
    names = [name for section in sections for name in page_names(section)]
    assert sorted(names) == sorted(architecture.name for architecture in script.ARCHITECTURES)
    assert len(BY_KEY) == len(script.ARCHITECTURES)


@pytest.mark.parametrize("name", PROMISED)
def test_what_was_promised_is_admitted(name: str) -> None:
    assert name in page_names("Admitted")


def test_the_page_marks_what_the_suite_holds_token_exact() -> None:
    marked = {
        line.split(" | ")[0].removeprefix("| ")
        for line in PAGE.read_text().splitlines()
        if line.endswith("| yes |")
    }
    exact = script.token_exact_keys()
    assert {"llama", "gpt2"} <= exact
    assert marked == {BY_KEY[key].name for key in exact if key in BY_KEY}


def test_the_page_marks_what_is_fused() -> None:
    marked = set()
    for line in PAGE.read_text().splitlines():
        cells = line.split(" | ")
        if len(cells) == 7 and cells[4] == "yes":
            marked.add(cells[1].strip("`"))
    assert marked == {f"{family.prefix}ForCausalLM" for family in FAMILIES}


def run_script(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(script.main)
    num_threads, verbosity = torch.get_num_threads(), hf.logging.get_verbosity()
    try:
        return CliRunner().invoke(app, list(arguments))
    finally:  # it sets both for its process, which here is everybody's
        torch.set_num_threads(num_threads)
        hf.logging.set_verbosity(verbosity)


@pytest.fixture
def three_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's table, cut to one that works, one that transformers lacks and a broken one."""
    lacking = script.Architecture("lacking", "Lacking", "NoSuchConfig", {})
    broken = script.Architecture("broken", "Broken", "LlamaConfig", {"hidden_size": "wide"})
    monkeypatch.setattr(script, "ARCHITECTURES", (broken, BY_KEY["llama"], lacking))


@pytest.mark.usefixtures("three_architectures")
def test_a_broken_architecture_is_an_error_of_the_script_and_stops_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert run_script("--page", str(page)).exit_code == script.EXIT_SCRIPT_ERROR
    text = page.read_text()
    assert "## Admitted (1)" in text
    assert "## Refused (0)" in text
    assert "## No verdict (2)" in text
    assert "| Broken | error of this page's script, building: " in text
    assert "| Lacking | transformers has no NoSuchConfig |" in text


@pytest.mark.usefixtures("three_architectures")
def test_check_shows_what_is_out_of_date_and_ignores_only_the_version(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    result = run_script("--check", "--page", str(page))
    assert result.exit_code == script.EXIT_OUT_OF_DATE
    assert "+| LLaMA | " in result.stdout
    assert not page.exists()

    run_script("--page", str(page))
    version = script.VERSION_LINE
    page.write_text(re.sub(f"^{version}.*$", f"{version}0.0.0.", page.read_text(), flags=re.M))
    assert run_script("--check", "--page", str(page)).exit_code == 0

    page.write_text(page.read_text().replace("| LLaMA |", "| Lama |"))
    result = run_script("--check", "--page", str(page))
    assert result.exit_code == script.EXIT_OUT_OF_DATE
    assert "-| Lama | " in result.stdout
    assert "+| LLaMA | " in result.stdout

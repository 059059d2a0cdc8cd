"""The list of mutations keeps up with the source; `make mutations` runs them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_list() -> Any:
    path = ROOT / "scripts" / "mutation_list.py"
    spec = importlib.util.spec_from_file_location("mutation_list", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mutation", load_list().MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_changes_one_place_and_names_a_test(mutation: Any) -> None:
    for edit in mutation.edits:
        assert (ROOT / edit.path).read_text().count(edit.old) == 1, edit
        assert edit.new != edit.old
    path, *classes, name = re.sub(r"\[.*\]$", "", mutation.test).split("::")
    source = (ROOT / path).read_text()
    assert all(f"class {one}" in source for one in classes)
    assert f"def {name}(" in source

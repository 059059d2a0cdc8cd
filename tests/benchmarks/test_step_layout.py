"""Parts of a step add up to the run, and the layout's table has each setting: on a toy model."""

import json

import layout
import pytest
import step
import torch
from contest import environments
from contest.shapes import NANO


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "models")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_of_a_step_add_up_to_the_run(tmp_path, monkeypatch, capsys):
    for module, name in ((step.generation, "sample"), (step.llm_engine, "report")):
        monkeypatch.setattr(module, name, getattr(module, name))  # its clocks go with the test
    file = tmp_path / "step.json"
    step.run(shape="nano", workload="parallel", runs=1, threads=1, json=file)
    result = json.loads(file.read_text())
    shown = result["shown"]
    assert sum(shown["parts_s"].values()) == pytest.approx(shown["wall_s"])
    assert all(seconds >= 0 for seconds in shown["parts_s"].values())
    assert result["floor_s"]["products, our kernel"] > 0
    assert "native forward" in capsys.readouterr().out


def test_the_layout_has_a_row_for_every_setting(tmp_path, capsys):
    file = tmp_path / "layout.json"
    layout.run(shapes="nano", runs=1, threads=1, json=file)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(layout.dials_of(NANO))
    assert [row["is_default"] for row in rows] == [True] + [False] * (len(rows) - 1)
    for row in rows:
        assert all(run["committed_per_live"]["min"] >= 1 for run in row["workloads"].values())
    assert "default" in capsys.readouterr().out

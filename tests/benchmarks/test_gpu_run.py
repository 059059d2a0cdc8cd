"""The GPU benchmark without a GPU: its dry run, its budget, its tables and figures."""

import json
import os
import sys

import pytest

from benchmarks.gpu import gpu_tests, summary
from benchmarks.gpu.child import run_child
from benchmarks.gpu.plan import RESERVED_SECONDS, SECTIONS, Budget, choose_sections
from benchmarks.gpu.prepare import ROOT
from benchmarks.gpu.run import Run, main
from benchmarks.gpu.section import Section
from tests.benchmarks.gpu_results import made_up_results
from vmalloc.measuring.provenance import provenance


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Exit status, output folder and results of one dry run of everything."""
    out = tmp_path_factory.mktemp("gpu")
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    ending = run_child(
        ["benchmarks/gpu/run.sh", "--dry-run"], env=env, cwd=ROOT, limit_s=280, log=out / "printed"
    )
    return ending, out, json.loads((out / "gpu_results.json").read_text())


def test_dry_run_passes(dry_run):
    ending, out, results = dry_run
    assert ending.returncode == 0, (out / "printed").read_text()
    assert "dry run: ok" in (out / "printed").read_text()
    assert {name: one["status"] for name, one in results["sections"].items()} == {
        section.name: "ok" for section in SECTIONS
    }


def test_dry_run_measures_the_stand_in_and_says_so(dry_run):
    _, out, results = dry_run
    assert results["dry_run"] is True
    drivers = {name: one["driver"] for name, one in results["sections"].items()}
    for name in ("facts", "driver_calls", "attention", "layout", "commit_jitter", "serving"):
        assert drivers[name] == "stand-in", name
    assert "cuda" not in drivers.values()
    assert "nothing above was measured on a GPU" in (out / "printed").read_text()
    runs = results["sections"]["driver_calls"]["result"]["runs"]
    assert {row["num_pages"] for row in runs} >= {1, 2, 8}
    assert all(row["map_us"]["median"] > 0 for row in runs)


def test_dry_run_leaves_few_files(dry_run):
    """Machines that are lent may hand back no more than a handful."""
    _, out, _ = dry_run
    assert {path.name for path in out.iterdir()} == {"gpu_results.json", "gpu_log.txt", "printed"}


def test_dry_run_serves_alike_on_both_backends(dry_run):
    serving = dry_run[2]["sections"]["serving"]["result"]
    assert {run["kv_backend"] for run in serving["runs"]} == {"virtual", "paged"}
    assert set(serving["agreement"].values()) == {1.0}
    assert all(run["peak_committed_bytes"] > 0 for run in serving["runs"])


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_budget_grants_the_limit_then_what_is_left_then_nothing():
    clock = Clock()
    budget = Budget(60.0 + RESERVED_SECONDS, clock)
    facts = next(one for one in SECTIONS if one.name == "facts")
    assert budget.grant_s(facts) == facts.limit_s
    clock.now += 40
    assert budget.grant_s(facts) == 20
    clock.now += 20 - facts.minimum_s
    assert budget.grant_s(facts) == facts.minimum_s
    clock.now += 1
    assert budget.grant_s(facts) is None


def test_a_section_leaves_the_later_ones_their_minimum():
    clock = Clock()
    tests, serving = (one for one in SECTIONS if one.name in ("tests", "serving"))
    budget = Budget(tests.limit_s + serving.minimum_s / 2 + RESERVED_SECONDS, clock)
    assert budget.grant_s(tests, [serving]) == tests.limit_s - serving.minimum_s / 2
    clock.now += tests.limit_s
    assert budget.grant_s(tests, [serving]) == tests.minimum_s  # the more important one goes first


def test_what_no_longer_fits_is_skipped_and_noted(tmp_path):
    run = Run(out=tmp_path, dry_run=False, budget_s=3.0, seed=0)
    run.run_all(SECTIONS)
    written = json.loads((tmp_path / "gpu_results.json").read_text())
    assert [one["status"] for one in written["sections"].values()] == ["skipped"] * len(SECTIONS)
    assert "s left of 3" in written["sections"]["serving"]["reason"]
    assert run.exit_status() == 1  # no build, no tests


def test_all_limits_fit_under_nine_minutes_but_for_what_is_skipped():
    from benchmarks.gpu.plan import TOTAL_SECONDS

    assert TOTAL_SECONDS < 9 * 60
    assert sum(section.minimum_s for section in SECTIONS) < TOTAL_SECONDS


def test_sections_are_chosen_by_name_and_prepared(capsys):
    names = [section.name for section in choose_sections("layout, facts")]
    assert names == ["prepare", "facts", "layout"]
    assert main(["--dry-run", "--sections", "factz"]) == 2
    assert "factz" in capsys.readouterr().err


def test_child_is_stopped_at_its_limit_with_all_that_it_started(tmp_path):
    marker = tmp_path / "late"
    script = f"sleep 2 && touch {marker} & sleep 30"
    log = tmp_path / "log"
    ending = run_child(["bash", "-c", script], env={}, cwd=tmp_path, limit_s=0.5, log=log)
    assert ending.returncode is None
    assert run_child(["sleep", "2.5"], env=dict(os.environ), cwd=tmp_path, limit_s=9, log=log)
    assert not marker.exists()


def test_a_suite_whose_time_is_up_reports_what_it_ran(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2\n"
        "def test_three(): time.sleep(60)\n"
    )
    seconds = 25 + gpu_tests.GRACE_SECONDS
    found = gpu_tests.run_suite(str(tmp_path), tmp_path / "report.xml", seconds, 1)
    assert found["returncode"] == gpu_tests.STOPPED
    assert found["passed"] > 0
    assert found["failed"] == 1
    (failure,) = gpu_tests.read_failures([tmp_path / "report.xml"])
    assert "1 == 2" in failure["message"]


def test_a_stopped_section_leaves_what_it_had(tmp_path):
    section = Section("facts", out=tmp_path / "facts.json", seconds=-1)
    section.put("a", 1)
    section.add("rows", {"b": 2})
    assert not section.has_time_for("the rest", 5)
    left = json.loads((tmp_path / "facts.json").read_text())
    assert left["result"] == {"a": 1, "rows": [{"b": 2}]}
    assert list(left["skipped"]) == ["the rest"]
    assert left["driver"] == "none"


def test_summary_has_a_table_for_every_section_that_measures(capsys):
    results = made_up_results()
    assert set(results["sections"]) == {one.name for one in SECTIONS}
    summary.print_summary(results)
    text = capsys.readouterr().out
    assert "incomplete" not in text
    for words in ("raw fa2, blocks of 256", "error 700", "stand-in", "virtual", "12.5 (13.0)"):
        assert words in text, words


def test_summary_says_where_a_section_was_cut_short(capsys):
    results = made_up_results()
    del results["sections"]["serving"]["result"]["runs"]
    summary.print_summary(results)
    assert "serving: incomplete" in capsys.readouterr().out


def test_a_copy_without_git_takes_its_commit_from_the_stamp(tmp_path, monkeypatch):
    from vmalloc.measuring import provenance as module

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "commit")
    assert provenance(0, ("no-such-package",))["commit"] == "unknown"
    (tmp_path / "commit").write_text("abc123\n")
    told = provenance(0, ("no-such-package",))
    assert told["commit"] == "abc123"
    assert told["versions"] == {"no-such-package": "not installed"}


def test_figures_are_drawn_from_results_but_not_from_a_dry_run(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need vmalloc[bench]")
    from benchmarks.gpu.plots import FIGURES, draw_all

    results = made_up_results()
    files = draw_all(results, tmp_path)
    assert len(files) == len(FIGURES)
    assert all("<svg" in file.read_text() for file in files)
    with pytest.raises(ValueError, match="dry run"):
        draw_all(results | {"dry_run": True}, tmp_path)

"""``vmalloc ab`` over the bundled model: a table, two files, and an exit status."""

import json
import sys

import pytest

from vmalloc import cli
from vmalloc.engine.ab import experiment


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command in this process, in a folder of its own; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmalloc", "ab", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,30,5\n0.01,12,8\n0.01,5,3\n")
    return path.name


def test_it_prints_a_table_and_writes_both_files(run, trace, tmp_path):
    code, out, err = run("--trace", trace, "--repeats", "2", "--seed", "7")
    assert code == 0, err
    assert "trace.csv" in out
    assert "Output tokens/s" in out
    assert "Outputs equal, token for token" in out
    summary = json.loads((tmp_path / "vmalloc-ab.json").read_text())
    assert summary["provenance"]["command"] == f"vmalloc ab --trace {trace} --repeats 2 --seed 7"
    assert summary["provenance"]["seed"] == 7
    assert list(summary["backends"]) == ["virtual", "paged"]
    assert summary["equality"]["is_equal"]
    assert [one["num_requests"] for one in summary["workloads"]] == [3]
    assert (tmp_path / "vmalloc-ab.html").read_text().startswith("<!doctype html>")


def test_sides_cap_and_files_are_as_asked_for(run, trace, tmp_path):
    code, out, _ = run(
        "--trace", trace, "--repeats", "1", "--backends", "paged, power_of_two",
        "--backends", "virtual", "--kv-cache-memory-bytes", str(4 << 20), "--json", "a.json",
        "--html", "b.html",
    )  # fmt: skip
    assert code == 0
    assert "cap 4.00 MiB, asked for" in " ".join(out.split())
    summary = json.loads((tmp_path / "a.json").read_text())
    assert list(summary["backends"]) == ["paged", "power_of_two", "virtual"]
    assert summary["workloads"][0]["cap_bytes"] == 4 << 20
    assert list(summary["score"]) == ["power_of_two", "virtual"]
    assert (tmp_path / "b.html").exists()
    assert not (tmp_path / "vmalloc-ab.json").exists()


def test_outputs_that_differ_are_the_exit_status(run, trace, monkeypatch):
    real, runs = experiment.run_once, []

    def plant(*args, **kwargs):
        runs.append(real(*args, **kwargs))
        runs[-1].requests[0].completions[0].token_ids[0] += len(runs) == 2
        return runs[-1]

    monkeypatch.setattr(experiment, "run_once", plant)
    code, out, _ = run("--trace", trace, "--repeats", "1")
    assert code == 1
    assert "Outputs DIFFER: 1 sequences" in " ".join(out.split())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of <memory>")])
def test_what_was_measured_before_a_break_is_kept(run, trace, tmp_path, monkeypatch, error):
    real, runs = experiment.run_once, []

    def break_off(*args, **kwargs):
        if len(runs) == 7:  # two sides: untimed, then two rounds and a half
            raise error
        runs.append(real(*args, **kwargs))
        return runs[-1]

    monkeypatch.setattr(experiment, "run_once", break_off)
    if isinstance(error, KeyboardInterrupt):
        code, out, _ = run("--trace", trace, "--repeats", "5")
        assert code != 0
    else:
        with pytest.raises(RuntimeError, match="out of <memory>"):
            run("--trace", trace, "--repeats", "5")
        out = ""
    summary = json.loads((tmp_path / "vmalloc-ab.json").read_text())
    (workload,) = summary["workloads"]
    assert workload["num_runs"] == 2
    for line in workload["table"]:
        assert {len(value["runs"]) for value in line["values"].values()} == {2}
    assert "Broken off in trace.csv, paged, run 3: " in summary["stopped"]
    page = (tmp_path / "vmalloc-ab.html").read_text()
    assert "Broken off in trace.csv" in page
    assert "33.3% of equals" in page
    assert "<memory>" not in page
    if out:
        assert "Broken off in trace.csv" in " ".join(out.split())


def test_a_break_before_the_first_round_is_whole_leaves_no_report(
    run, trace, tmp_path, monkeypatch
):
    def break_off(*_, **__):
        raise RuntimeError("at once")

    monkeypatch.setattr(experiment, "run_once", break_off)
    with pytest.raises(RuntimeError, match="at once"):
        run("--trace", trace)
    assert not (tmp_path / "vmalloc-ab.json").exists()


def test_names_of_files_are_shown_as_they_are(run, tmp_path):
    (tmp_path / "a").mkdir()
    name = '[red] $\\x_$ "><script>.csv'
    for path in (tmp_path / name, tmp_path / "a" / name):
        path.write_text("arrival_s,prompt_tokens,output_tokens\n0,30,5\n")
    code, out, err = run(
        "--trace", name, "--trace", f"a/{name}", "--repeats", "1", "--json", "[i].json"
    )
    assert code == 0, err
    assert "[red] $\\x_$" in out
    assert "Wrote [i].json" in out
    page = (tmp_path / "vmalloc-ab.html").read_text()
    assert "<script" not in page
    names = [one["name"] for one in json.loads((tmp_path / "[i].json").read_text())["workloads"]]
    assert names == [name, f"a/{name}"]


def test_who_serves_fewer_requests_is_named(run, tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,90,20\n0,5,5\n")
    code, out, err = run(
        "--trace", "t.csv", "--repeats", "2", "--kv-cache-memory-bytes", str(256 << 10),
        "--backends", "virtual,max_length", "--page-size", "65536",
    )  # fmt: skip
    assert code == 0, err
    assert "1 with virtual, 2 with max_length" in " ".join(out.split())
    assert "better" not in out.split("Outputs equal")[0]
    assert "worse" not in out.split("Outputs equal")[0]
    summary = json.loads((tmp_path / "vmalloc-ab.json").read_text())
    assert summary["score"]["max_length"] == {"better": 1, "tie": 0, "worse": 0}
    assert "1 with virtual, 2 with max_length" in (tmp_path / "vmalloc-ab.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backends", "virtual"], "needs at least 2"),
        (["--workload", "chat"], "workload is 'chat'"),
        (["--trace", "none.csv"], "none.csv'; it cannot be read"),
        (["--json", "no/such/folder.json"], "output is 'no/such/folder.json'"),
        (["--html", "."], "output is '.'; it is a folder"),
        (["--json", "one", "--html", "./one"], "output is 'one' twice"),
        (["--repeats", "0"], "repeats is 0"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(run, arguments, words, tmp_path):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert list(tmp_path.iterdir()) == []

"""Peers beside us: what they are given, how runs are summed up, and one quick run of two."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import peers
import pytest
import typer
from contest import environments, plan, runs, summary
from contest.environments import Environments, Unavailable
from contest.peers import DEFAULT_PEERS, PEERS, Peer
from contest.shapes import NANO, SHAPES, SMALL, TINY, checkpoint
from contest.workers import make_gguf, measured
from contest.workers.measured import Completion, Request

LIMITS = runs.Limits(threads=1, timeout_s=30, max_foreign_cores=0.15)
PLAN = plan.Plan((PEERS["vmalloc"],), (NANO,), ("offline",), 1, 0, LIMITS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    return tmp_path


def make_run(peer, speed, *, number=0, is_quiet=True, workload="offline"):
    return {
        "peer": peer,
        "shape": "tiny",
        "workload": workload,
        "round": number,
        "is_quiet": is_quiet,
        "tokens_per_s": speed,
        "tokens_per_cpu_s": speed,
        "foreign_cores": 0.0 if is_quiet else 1.0,
        "output_tokens": 100,
        "peak_rss_bytes": 1 << 20,
        "ttft_ms": {"p50": 1.0, "p99": 2.0},
        "tpot_ms": {"p50": 3.0, "p99": 4.0},
        "kv": {"reserved": 10, "committed": 5},
        **dict.fromkeys(("wall_s", "import_s", "construct_s", "ready_s"), 1.0),
    }


def test_shapes_have_the_sizes_that_they_are_known_by():
    assert TINY.num_parameters == pytest.approx(3.2e6, rel=0.01)
    assert SMALL.num_parameters == pytest.approx(88e6, rel=0.01)


def test_a_checkpoint_has_as_many_weights_as_its_shape_says(tmp_path):
    from safetensors.numpy import load_file

    path = checkpoint(NANO, tmp_path, seed=0)
    tensors = load_file(path / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) == NANO.num_parameters
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert checkpoint(NANO, tmp_path, seed=0) == path


def test_every_tensor_has_its_name_and_shape_in_a_gguf_file(tmp_path):
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint(NANO, tmp_path, seed=0) / "model.safetensors")
    heads = NANO.num_heads, NANO.num_kv_heads
    renamed = {
        make_gguf.gguf_name(name): make_gguf.reshaped(name, tensor, heads)
        for name, tensor in tensors.items()
    }
    assert len(renamed) == len(tensors)
    extended = (NANO.vocab_size + make_gguf.NUM_EXTRA, NANO.hidden_size)
    assert renamed["token_embd.weight"].shape == renamed["output.weight"].shape == extended
    assert not renamed["output.weight"][NANO.vocab_size :].any()
    # Two halves of each head become pairs of neighbours: row 32 of head 0 follows row 0.
    before = tensors["model.layers.0.self_attn.q_proj.weight"]
    after = renamed["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(after[[0, 1, 2, 64]], before[[0, 32, 1, 64]])


def test_the_same_seed_gives_the_same_requests_within_the_context(folder):
    job = plan.make_job(SHAPES["tiny"], "offline", PLAN)
    assert job == plan.make_job(SHAPES["tiny"], "offline", PLAN)
    assert len(job.requests) == 64
    for request in job.requests:
        assert len(request.prompt) + request.max_tokens <= job.max_model_len
        assert max(request.prompt) < TINY.vocab_size
    starts = {tuple(request.prompt[:8]) for request in job.requests}
    assert not starts & {tuple(request.prompt[:8]) for request in job.warm_up}


def test_parallel_requests_are_sampled_and_the_check_is_greedy(folder):
    parallel = plan.make_job(NANO, "parallel", PLAN)
    assert {request.n for request in parallel.requests} == {4}
    assert {request.n for request in parallel.warm_up} == {4}
    assert not parallel.is_greedy
    check = plan.make_check(SHAPES["tiny"], PLAN)
    assert check.is_greedy
    assert len(check.requests) == plan.NUM_CHECKED


@pytest.mark.parametrize("names", ["vmalloc,nobody", "", " , "])
def test_names_that_nobody_knows_are_refused(names):
    with pytest.raises(typer.BadParameter, match=r"known: vmalloc, vmalloc-paged"):
        peers.choose("--peers", names, PEERS)


def test_names_keep_their_order():
    assert peers.choose("--peers", "vllm, vmalloc", PEERS) == (PEERS["vllm"], PEERS["vmalloc"])
    assert "vmalloc-paged" not in DEFAULT_PEERS


def test_an_environment_that_exists_is_used(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    given = peers.parse_venvs([f"vllm={tmp_path}"])
    assert Environments(given).python("vllm") == tmp_path / "bin" / "python"


@pytest.mark.parametrize("value", ["nobody=/tmp", "vllm", "vllm=/no/such/folder"])
def test_an_environment_that_is_not_there_is_refused(value):
    with pytest.raises(typer.BadParameter, match=re.escape(value)):
        peers.parse_venvs([value])


def test_without_a_server_llama_cpp_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"--build-llama-cpp"):
        PEERS["llama.cpp"].resolved_options(NANO, Environments())


def test_no_engine_waits_as_this_process_was_told_to(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    for peer in PEERS.values():
        variables = runs.environment_of(peer, threads=2)
        assert "GOMP_SPINCOUNT" not in variables
        assert variables["OMP_NUM_THREADS"] == "2"


def test_percentiles_are_those_of_the_nearest_rank():
    assert runs.percentiles([4.0, 1.0, 3.0, 2.0]) == {"p50": 2.0, "p99": 4.0}
    assert runs.percentiles([5.0]) == {"p50": 5.0, "p99": 5.0}
    assert runs.percentiles([]) == {}


def test_latencies_follow_from_first_and_last_tokens():
    streams = [
        {"first_s": 0.1, "last_s": 0.5, "token_ids": [1, 2, 3]},
        {"first_s": 0.2, "last_s": 0.2, "token_ids": [1]},  # has no time between tokens
    ]
    found = runs.latencies(streams)
    assert found["ttft_ms"] == pytest.approx({"p50": 100, "p99": 200})
    assert found["tpot_ms"] == pytest.approx({"p50": 200, "p99": 200})


def test_noisy_runs_do_not_count_where_a_quiet_one_exists():
    speeds = [(100.0, True), (300.0, True), (7.0, False)]
    (row,) = summary.summarize(
        [make_run("vllm", speed, is_quiet=is_quiet) for speed, is_quiet in speeds]
    )
    assert row["tokens_per_s"] == {"median": 200.0, "min": 100.0, "max": 300.0}
    assert (row["num_runs"], row["num_quiet"]) == (3, 2)
    (row,) = summary.summarize([make_run("vllm", 7.0, is_quiet=False)])
    assert (row["tokens_per_s"]["median"], row["num_quiet"]) == (7.0, 0)


def test_ratios_are_against_the_best_rival_and_continuous_batching():
    measured_runs = [
        make_run("vmalloc", 300.0, number=0),
        make_run("vmalloc", 330.0, number=1),
        make_run("vmalloc-paged", 900.0),  # is no rival
        make_run("vllm", 200.0, number=0),
        make_run("vllm", 110.0, number=1),
        make_run("hf-continuous", 50.0),
    ]
    best, continuous = summary.ratios(measured_runs)
    assert (best.rival, best.target) == ("vllm", 1.5)
    assert best.median == pytest.approx(315 / 155)
    assert (best.lowest, best.highest) == pytest.approx((1.5, 3.0))
    assert str(best).endswith("target 1.5x met")
    assert (continuous.rival, continuous.target) == ("hf-continuous", 3.0)
    assert summary.ratios([make_run("vllm", 1.0)]) == []


def test_a_missed_target_says_so():
    found = summary.ratios([make_run("vmalloc", 100.0), make_run("vllm", 200.0)])
    assert str(found[0]) == "tiny offline: 0.50x of vLLM CPU, compiled; target 1.5x MISSED"


def test_tokens_are_compared_up_to_where_they_part():
    found = summary.compare_tokens([[1, 2, 3], [4, 5], [6]], [[1, 2, 3], [4, 9], [7]])
    assert found == {"num_equal": 1, "num": 3, "parted_at": [1, 0]}


def test_cpu_time_of_a_process_group_and_of_all_cores(tmp_path):
    for pid, group, times in ((1, 7, (100, 50, 20, 10)), (2, 8, (1000, 0, 0, 0)), (3, 7, (1,) * 4)):
        fields = ["S", "0", str(group), *["0"] * 8, *map(str, times), "0"]
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) name) {' '.join(fields)}\n")
    (tmp_path / "stat").write_text("cpu  100 10 20 9999 8888 3 4 13 0 0\ncpu0 0 0 0 0\n")
    assert measured.group_cpu_s(7, tmp_path) == pytest.approx(184 / measured.TICKS_PER_S)
    assert measured.busy_cpu_s(tmp_path / "stat") == pytest.approx(150 / measured.TICKS_PER_S)


def test_a_stream_that_is_short_or_missing_fails_the_run(folder):
    job = replace(plan.make_check(NANO, PLAN), requests=[Request([1], max_tokens=2, n=2)])
    full = Completion(0, [5, 6], 0.0, 1.0)
    measured.check_completions(job, [full, full])
    for wrong in ([full], [full, replace(full, token_ids=[5])]):
        with pytest.raises(RuntimeError, match=r"request 0 got .* expected \[2, 2\]"):
            measured.check_completions(job, wrong)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit('no such model')", r"exit status 1: no such model"),
        ("pass", r"exit status 0: no word"),
        ("import time; time.sleep(60)", r"took more than 1 s"),
    ],
)
def test_a_worker_that_gives_no_result_says_why(folder, script, reason):
    worker = folder / "worker.py"
    worker.write_text(script)
    peer = Peer("vmalloc", "", str(worker), "vmalloc", {})
    limits = replace(LIMITS, timeout_s=1)
    with pytest.raises(runs.RunFailed, match=reason):
        runs.run_peer(peer, sys.executable, plan.make_check(NANO, PLAN), limits)


def test_a_quick_run_of_two_peers_and_one_that_cannot_run(folder, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result_file, figure, table = folder / "peers.json", folder / "peers.svg", folder / "peers.md"
    peers.main(
        peers="vmalloc,hf-generate,llama.cpp",
        workloads="parallel",
        threads=1,
        json_file=result_file,
        figure=figure,
        table=table,
        quick=True,
        timeout=300,
        max_foreign_cores=64,
    )
    result = json.loads(result_file.read_text())
    assert [row["peer"] for row in result["rows"]] == [run["peer"] for run in result["runs"]]
    assert {row["peer"] for row in result["rows"]} == {"vmalloc", "hf-generate"}
    expected = sum(
        request.n * request.max_tokens for request in plan.make_job(NANO, "parallel", PLAN).requests
    )
    for run in result["runs"]:
        assert run["output_tokens"] == expected
        assert run["tokens_per_s"] == pytest.approx(expected / run["wall_s"])
        assert 0 < run["construct_s"] < run["ready_s"]
        assert run["kv"]["committed"] <= run["kv"]["reserved"]
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"] < run["wall_s"] * 1e3
    assert all(check["num_equal"] == check["num"] == 6 for check in result["greedy_check"])
    assert [failure["peer"] for failure in result["left_out"]] == ["llama.cpp"]
    assert "llama.cpp left out" in capsys.readouterr().out
    assert "<svg" in figure.read_text()
    assert "**vmalloc, virtual**" in table.read_text()

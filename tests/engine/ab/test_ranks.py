"""Runs over several ranks: each loads its share, and memory is that of all of them."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from vmalloc.engine import ConfigError, EngineConfig, load_engine
from vmalloc.engine.ab.experiment import ABSettings, run_experiment
from vmalloc.engine.ab.page import render_page
from vmalloc.engine.ab.run import run_once
from vmalloc.engine.ab.summary import summarize
from vmalloc.engine.ab.terminal import ab_report
from vmalloc.engine.ab.trace_file import read_trace
from vmalloc.measuring.provenance import provenance


def test_a_run_over_two_ranks_gives_the_tokens_of_one_and_the_memory_of_both(trace):
    workload = read_trace(trace, vocab_size=512, context_tokens=256, seed=0)
    workload = replace(workload, is_realtime=False)  # so that the same run together, however fast
    engines, runs = [], []

    def make_engine(config):
        engines.append(load_engine("demo", None, config, skip_tokenizer_init=True))
        return engines[-1]

    for num_ranks in (1, 2):
        config = EngineConfig(
            tensor_parallel_size=num_ranks, max_model_len=256, layers_per_group=1, page_size=8192
        )
        runs.append(run_once(make_engine, config, workload))
    one, two = runs
    texts = [[done.completions[0].token_ids for done in run.requests] for run in runs]
    assert texts[0] == texts[1]
    assert one.driver == two.driver == "host"
    assert two.values["steps"] > 0
    assert two.values["peak_live_bytes"] == one.values["peak_live_bytes"]
    stats = engines[1].leader.times
    assert stats.num_steps == two.values["steps"]


def test_a_loaded_model_is_no_model_of_ranks(model, trace):
    settings = ABSettings(
        workloads=(), traces=(trace,), config=EngineConfig(tensor_parallel_size=2)
    )
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2 and the model is loaded"):
        run_experiment(settings, model)


def test_reports_say_whose_figures_they_have(result):
    settings = result.settings
    ranked = replace(settings, config=replace(settings.config, tensor_parallel_size=2))
    before = summarize(result, provenance(0, ("torch",)))
    summary = summarize(replace(result, settings=ranked), provenance(0, ("torch",)))
    for one, two in zip(before["workloads"], summary["workloads"], strict=True):
        assert two["cap_bytes"] == 2 * one["cap_bytes"]
    assert before["ranks"] == ""
    console = Console(file=StringIO(), width=200)
    console.print(ab_report(summary, width=200))
    for text in (console.file.getvalue(), render_page(summary)):
        assert "2 ranks: KV memory and its cap are those of all of them together" in text
    json.dumps(summary)

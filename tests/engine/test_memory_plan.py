"""The memory plan says what the engine then does, and needs no weights to say it."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.engine.conftest import CONFIGS
from vmalloc import SequenceGroupSpec
from vmalloc.engine import EngineConfig, LLMEngine, load_engine
from vmalloc.engine.cache_factory import CacheFactory
from vmalloc.engine.cache_setup import cache_config
from vmalloc.engine.device_memory import run_largest_step
from vmalloc.engine.memory_plan import MemoryPlan, counting_twin, plan_memory
from vmalloc.engine.memory_plan_table import memory_plan_report
from vmalloc.engine.model_loader import load_model, outline_model, resolve_model_name
from vmalloc.engine.probe import observe_outline, probe_model
from vmalloc.engine.workspace import PeakBytes, estimate_workspace
from vmalloc.errors import ConfigError, VmallocError

PAGE = 4096
CPU = torch.device("cpu")
TIGHT = {"page_size": PAGE, "kv_cache_memory_bytes": 150 * PAGE, "max_num_seqs": 6}


def assert_engine_does_as_planned(plan: MemoryPlan, engine: LLMEngine) -> None:
    backend, config, stats = engine.backend, engine.config, engine.kv_stats()
    assert plan.layers == backend.config.layers
    assert plan.token_bytes == backend.config.token_bytes
    assert plan.cap_bytes == stats.capacity_bytes
    assert plan.reserved_bytes == stats.reserved_bytes
    assert plan.page_bytes == stats.page_bytes
    assert plan.num_slots == getattr(getattr(backend, "layout", None), "num_slots", None)
    assert plan.kv_backend == backend.name
    assert plan.swap_space_bytes == config.swap_space_bytes
    assert plan.max_model_len == config.max_model_len
    assert plan.max_num_batched_tokens == config.max_num_batched_tokens
    assert plan.max_seq_tokens == backend.max_seq_tokens()
    assert plan.max_full_length_seqs == num_full_length(engine)


def num_full_length(engine: LLMEngine) -> int:
    """Sequences of full length that the engine's cache really takes at once."""
    backend, length = engine.backend, engine.config.max_model_len
    assert length is not None
    admitted: list[int] = []
    num_full = 0
    for seq_id in range(engine.config.max_num_seqs):
        if backend.try_admit(SequenceGroupSpec((seq_id,), 1)) is None:
            break
        admitted.append(seq_id)
        if not backend.try_extend([seq_id], [length]):
            break
        num_full += 1
    backend.free(admitted)
    return num_full


@pytest.mark.parametrize("backend", ["virtual", "paged"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_memory_bytes": 20 << 20},
        {"max_num_seqs": 2, "max_model_len": 500},  # less than any machine's quarter
        {"max_num_seqs": 3, "page_size": PAGE, "layers_per_group": 1, "swap_space_bytes": 0},
        {"max_num_batched_tokens": 96, "commit_ahead_tokens": 0, "kv_cache_memory_bytes": 9999999},
    ],
)
def test_the_demo_models_engine_does_as_planned(backend: Any, settings: dict[str, Any]) -> None:
    config = EngineConfig(**{"kv_backend": backend, "max_num_seqs": 8, **settings})
    plan = plan_memory("demo", config)
    assert plan.is_cap_exact
    model = load_model(resolve_model_name("demo"), "auto", CPU)
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    with LLMEngine(model, None, config) as engine:
        assert_engine_does_as_planned(plan, engine)


@pytest.mark.parametrize("backend", ["virtual", "paged"])
@pytest.mark.parametrize(
    "name", ["llama-5x3x40", "gpt2", "gemma2", "mistral", "deepseek-v3", "mixtral", "opt"]
)
def test_the_engine_over_a_tiny_model_does_as_planned(
    name: str, backend: Any, tiny_model: Any, tmp_path: Path
) -> None:
    CONFIGS[name]().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # and no weights
    config = EngineConfig(kv_backend=backend, **TIGHT)
    plan = plan_memory(tmp_path, config)
    model = copy.deepcopy(tiny_model(name))
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    with LLMEngine(model, None, config) as engine:
        assert_engine_does_as_planned(plan, engine)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_outline_shows_the_layers_that_the_probe_sees(
    name: str, tiny_model: Any, tmp_path: Path
) -> None:
    CONFIGS[name]().save_pretrained(tmp_path)
    plan = plan_memory(tmp_path, EngineConfig(**TIGHT))
    assert plan.layers == probe_model(copy.deepcopy(tiny_model(name)), CacheFactory(CPU)).layers


@pytest.mark.parametrize("num_ranks", [2, 4])  # a KV head each, and one for two ranks
def test_a_rank_of_several_does_as_planned(num_ranks: int) -> None:
    settings = {"tensor_parallel_size": num_ranks, "kv_cache_memory_bytes": 20 << 20}
    config = EngineConfig(**settings, max_num_seqs=8)
    plan = plan_memory("demo", config)
    assert plan.num_ranks == num_ranks
    with load_engine("demo", None, config, skip_tokenizer_init=True) as engine:
        parameters = [getattr(one, "to_local", lambda one=one: one)() for one in weights_of(engine)]
        assert plan.weight_bytes == sum(parameter.nbytes for parameter in parameters)
        assert plan.layers == engine.backend.config.layers
        assert plan.token_bytes == engine.backend.config.token_bytes
        for report in engine.rank_reports():
            assert report.kv_stats.capacity_bytes == plan.cap_bytes == 20 << 20
            assert report.kv_stats.page_bytes == plan.page_bytes
            assert report.kv_stats.reserved_bytes == plan.reserved_bytes
        assert engine.rank_reports()[-1].rank == num_ranks - 1
    text = printed(plan)
    assert "sizes are those of one" in text
    assert f"{num_ranks * 20}.0 MiB on all ranks" in text


def weights_of(engine: LLMEngine) -> list[Any]:
    return list(engine._model.parameters())


def test_ranks_that_do_not_fit_are_refused_without_starting_one() -> None:
    for num_ranks in (3, 8):
        with pytest.raises(ConfigError, match=f"tensor_parallel_size is {num_ranks}"):
            plan_memory("demo", EngineConfig(tensor_parallel_size=num_ranks))


def printed(plan: MemoryPlan) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(memory_plan_report(plan))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_cap_is_certain_unless_it_depends_on_free_memory() -> None:
    asked = plan_memory("demo", EngineConfig(kv_cache_memory_bytes=10 << 20))
    assert (asked.is_cap_exact, asked.cap_reason) == (True, "asked for")
    most = plan_memory("demo", EngineConfig(max_num_seqs=1, max_model_len=64))
    assert most.is_cap_exact
    # Four layers with rows of a KiB each, in pages of 16 KiB.
    assert most.cap_bytes == (64 * 4096 + 4 * 2 * 65536) // 16384 * 16384
    assert most.cap_reason.startswith("full length for 1 sequences")
    # More than any machine has: what is free decides, and the plan says that it may change.
    free = plan_memory("demo", EngineConfig(max_num_seqs=10**6, max_num_batched_tokens=10**6))
    assert not free.is_cap_exact
    assert free.cap_bytes < free.available_bytes / 2
    assert any("--kv-cache-memory-bytes" in note for note in free.notes)
    assert not any("--kv-cache-memory-bytes" in note for note in asked.notes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_workspace_is_what_the_largest_step_really_makes(
    name: str, tiny_model: Any, tmp_path: Path
) -> None:
    CONFIGS[name]().save_pretrained(tmp_path)
    shape = {"num_tokens": 120, "num_seqs": 16, "max_model_len": 160}
    outline = outline_model(str(tmp_path), "float32", CPU)
    observe_outline(outline)
    estimate = estimate_workspace(outline, **shape)
    model = copy.deepcopy(tiny_model(name))
    probe_model(model, CacheFactory(CPU))
    with PeakBytes() as real:
        run_largest_step(model, **shape)
    assert estimate == pytest.approx(real.peak_bytes, rel=0.2)
    assert estimate_workspace(outline, **{**shape, "num_tokens": 240}) > 1.5 * estimate


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    with PeakBytes() as mode:
        first = torch.empty(1000, device="meta")
        second = first + first
        del first
        third = second * 2
        assert third.view(10, 100).shape == (10, 100)
    assert mode.peak_bytes == 8000


@pytest.mark.parametrize("kind", ["virtual", "paged"])
@pytest.mark.parametrize("settings", [{}, {"layers_per_group": 2, "page_size": 8192}])
def test_the_counting_twin_of_a_gpus_cache_counts_as_the_real_one(
    kind: Any, settings: dict[str, Any]
) -> None:
    plan = plan_memory("demo", EngineConfig(kv_cache_memory_bytes=10 << 20))
    resolved = replace(
        EngineConfig(kv_backend=kind, kv_cache_memory_bytes=10 << 20, **settings),
        swap_space_bytes=0,
        max_model_len=2048,
    )
    config = cache_config(resolved, plan.layers)
    caches = CacheFactory(CPU, kind)
    with caches.make(config, 4)[0] as real, counting_twin(config, kind) as twin:
        ours, theirs = real.stats(), twin.stats()
        assert (ours.reserved_bytes, ours.capacity_bytes) == (
            theirs.reserved_bytes,
            theirs.capacity_bytes,
        )
        assert ours.page_bytes == theirs.page_bytes
        assert real.bytes_for(777) == twin.bytes_for(777)
        assert real.max_seq_tokens() == twin.max_seq_tokens()


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("no/such-model", {}, "no/such-model"),
        ("demo", {"max_model_len": 4096}, "max_model_len is 4096.*2048"),
        ("demo", {"page_size": 5000}, "5000.*4096"),
        ("demo", {"layers_per_group": 9}, "layers_per_group is 9.*4"),
        ("demo", {"kv_cache_memory_bytes": 65536}, "holds 4 pages"),
        ("demo", {"dtype": "float16", "device": "cpu"}, "float16.*bfloat16"),
        ("demo", {"device": "cuda:4095"}, "cuda:4095.*GPU"),
        ("demo", {"kv_driver": "null"}, "kv_driver is 'null'"),
    ],
)
def test_what_the_engine_would_refuse_is_refused(
    model: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_memory(model, EngineConfig(**settings))


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=32).save_pretrained(
        tmp_path
    )
    with pytest.raises(VmallocError, match="encoder-decoder"):
        plan_memory(tmp_path)


def test_a_cap_below_one_sequence_fits_none_of_full_length() -> None:
    plan = plan_memory("demo", EngineConfig(kv_cache_memory_bytes=4 << 20))
    assert plan.max_full_length_seqs == 0
    assert plan.max_seq_tokens == (4 << 20) // 4096
    assert any("none of full length" in note.lower() for note in plan.notes)


def test_the_table_has_every_figure_and_the_plan_is_plain_values() -> None:
    plan = plan_memory("demo", EngineConfig(device="cpu", kv_cache_memory_bytes=100 << 20))
    console = Console(width=120, file=io.StringIO())
    console.print(memory_plan_report(plan))
    text = console.file.getvalue()
    for words in ("4.0 KiB", "100.0 MiB", "1.0 GiB", "128 slots", "25,600", "load probe"):
        assert words in text
    assert json.loads(json.dumps(asdict(plan)))["max_full_length_seqs"] == 12

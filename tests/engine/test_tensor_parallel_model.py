"""A model that ranks share gives the logits of the whole one, or is refused by name.

Owns: two groups of processes, one at a time, for the whole file.  Thread-safety: none.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.engine.conftest import CONFIGS, VOCAB_SIZE
from tests.engine.rank_forks import run_on_ranks
from tests.engine.sharded_cases import (
    NUM_NEW_TOKENS,
    RankReport,
    eager_logits,
    examine_all,
    greedy,
    save_model,
    shape,
)
from tests.engine.test_supported_models import page_names, script
from vmalloc.engine import ConfigError, EngineConfig, UnsupportedModelError
from vmalloc.engine.fused.choice import choose_fused
from vmalloc.engine.model_loader import resolve_model_name
from vmalloc.engine.tensor_parallel.rank_share import RankShare, mark_share, share_of
from vmalloc.engine.tensor_parallel.sharded_model import check_shardable
from vmalloc.engine.tensor_parallel.sharding_checks import EXACT_STYLES, PLAN_CHECK, sharding_plan

RELATIVE_TOLERANCE = 2e-5
"""Sums of a matrix product are added up in another order; a wrong share is off by 1."""

# Name -> config, query heads and KV heads on each rank.
TWO_RANKS: dict[str, tuple[Any, int, int]] = {
    "llama": (shape("llama", 4, 2), 2, 1),
    "qwen2": (shape("qwen2", 4, 2), 2, 1),  # has biases
    "qwen3": (shape("qwen3", 4, 2), 2, 1),  # has norms of queries and keys
    "mistral": (shape("mistral", 4, 2), 2, 1),
    "gemma2": (shape("gemma2", 4, 4), 2, 2),
    "gemma3": (shape("gemma3", 4, 2), 2, 1),
    "phi3": (shape("phi3", 4, 2), 4, 2),  # its packed projections are computed whole
    "olmo2": (shape("olmo2", 4, 2), 4, 2),  # its norms span the heads
    "mixtral": (shape("mixtral", 4, 2), 2, 1),
    "latent": (CONFIGS["deepseek-v3"](), 6, 6),
    "one KV head": (shape("llama", 4, 1), 2, 1),
    "one KV head, biases": (shape("qwen2", 4, 1), 2, 1),
    "one KV head, norms": (shape("gemma3", 4, 1), 2, 1),
    "tied": (shape("llama", 4, 2, tie_word_embeddings=True), 2, 1),
    "even vocabulary": (shape("llama", 4, 2, vocab_size=VOCAB_SIZE + 1), 2, 1),
    "tied, even vocabulary": (
        shape("llama", 4, 2, vocab_size=VOCAB_SIZE + 1, tie_word_embeddings=True),
        2,
        1,
    ),
}
FOUR_RANKS: dict[str, tuple[Any, int, int]] = {
    "llama": (shape("llama", 8, 4), 2, 1),
    "two KV heads": (shape("llama", 8, 2), 2, 1),
    "two KV heads, biases": (shape("qwen2", 8, 2), 2, 1),
    "one KV head": (shape("llama", 4, 1), 1, 1),
}
# Model, then what its plan is made to lack -> the rule, and how the model is refused.
FORGOTTEN = {
    "mixtral sum": ("layers.*.mlp.experts", "its forward pass fails when sharded: "),
    "mixtral experts": (
        "layers.*.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts is summed over ranks, and gate_up_proj is not sharded",
    ),
    "llama output": ("layers.*.self_attn.o_proj", "its forward pass fails when sharded: "),
}
GENERATING = {"llama", "gemma2", "one KV head", "two KV heads", "demo"}
ADMITTED = [
    architecture
    for architecture in script.ARCHITECTURES
    if architecture.name in page_names("Admitted") and hasattr(hf, architecture.config_class)
]


def config_of(architecture: Any) -> Any:
    return getattr(hf, architecture.config_class)(**architecture.settings)


def is_shardable(config: Any) -> bool:
    try:
        check_shardable("", config, 2)
    except UnsupportedModelError:
        return False
    return True


SHARDED = [architecture for architecture in ADMITTED if is_shardable(config_of(architecture))]


class Group:
    """What all ranks of one group reported, beside the whole models."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.whole: dict[str, Any] = {}
        self.folders: dict[str, str] = {}
        self.reports: list[dict[str, RankReport]] = []
        self._folder = folder

    def add(self, name: str, config: Any) -> Path:
        folder = self._folder / name
        self.whole[name] = save_model(config, folder)
        self.folders[name] = str(folder)
        return folder

    def run(self, probed: set[str], **forgotten: str) -> None:
        meeting = self._folder / "ranks"
        meeting.mkdir()
        work = (self.folders, probed, GENERATING, forgotten)
        self.reports = run_on_ranks(self.size, examine_all, meeting, *work)

    def of(self, name: str) -> list[RankReport]:
        """What each rank reported of a model that should work."""
        reports = [by_name[name] for by_name in self.reports]
        assert [report.error for report in reports] == [None] * self.size
        return reports


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Group:
    group = Group(2, tmp_path_factory.mktemp("two"))
    for name, (config, _, _) in TWO_RANKS.items():
        group.add(name, config)
    group.folders["demo"] = resolve_model_name("demo")
    group.whole["demo"] = hf.AutoModelForCausalLM.from_pretrained(group.folders["demo"])
    for architecture in SHARDED:
        group.add(architecture.key + " of the page", config_of(architecture))
    group.add("gpt2", CONFIGS["gpt2"]())
    path = group.add("lacking", TWO_RANKS["llama"][0]) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    for name in FORGOTTEN:
        group.add(name, TWO_RANKS[name.split()[0]][0])
    group.run({*TWO_RANKS, "demo"}, **{name: rule for name, (rule, _) in FORGOTTEN.items()})
    return group


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Group:
    group = Group(4, tmp_path_factory.mktemp("four"))
    for name, (config, _, _) in FOUR_RANKS.items():
        group.add(name, config)
    group.run(set(FOUR_RANKS))
    return group


def assert_same_logits(group: Group, name: str) -> None:
    whole = eager_logits(group.whole[name])
    for report in group.of(name):
        assert report.logits.shape == whole.shape
        difference = (report.logits - whole).abs().max() / whole.abs().max()
        assert difference <= RELATIVE_TOLERANCE


def assert_heads(group: Group, name: str, num_heads: int, num_kv_heads: int) -> None:
    seen = [(report.num_heads, report.num_kv_heads) for report in group.of(name)]
    assert seen == [(num_heads, num_kv_heads)] * group.size


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_the_logits_of_one(two: Group, name: str) -> None:
    assert_same_logits(two, name)
    assert_heads(two, name, *TWO_RANKS[name][1:])


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_give_the_logits_of_one(four: Group, name: str) -> None:
    assert_same_logits(four, name)
    assert_heads(four, name, *FOUR_RANKS[name][1:])


def test_the_bundled_model_can_be_sharded(two: Group) -> None:
    assert_same_logits(two, "demo")
    assert_heads(two, "demo", 2, 1)


@pytest.mark.parametrize("key", [architecture.key for architecture in SHARDED])
def test_what_the_page_calls_sharded_is_exact(two: Group, key: str) -> None:
    assert_same_logits(two, key + " of the page")


def test_only_ways_to_shard_that_are_tried_here_are_allowed() -> None:
    plans = [sharding_plan("", config_of(architecture)) for architecture in SHARDED]
    tried = {style for plan in plans for style in plan.values()}
    # The models with an even vocabulary.
    assert tried | {"embedding_rowwise"} == EXACT_STYLES


def test_the_page_says_what_is_sharded() -> None:
    by_key = {architecture.key: architecture for architecture in ADMITTED}
    page = {
        cells[0].removeprefix("| "): cells[5]
        for line in script.PAGE.read_text().splitlines()
        if len(cells := line.split(" | ")) == 7
    }
    for key, sharding in (("llama", "weights, KV"), ("phi3", "weights"), ("gpt2", "")):
        model = script.build_model(by_key[key])
        assert script._sharding(model) == sharding
        assert page[by_key[key].name] == sharding


@pytest.mark.parametrize("name", sorted(GENERATING & {*TWO_RANKS, "demo"}))
def test_engines_in_lock_step_write_what_one_writes(two: Group, name: str) -> None:
    written = greedy(copy.deepcopy(two.whole[name]))
    assert {len(token_ids) for token_ids in written} == {NUM_NEW_TOKENS}
    assert [report.token_ids for report in two.of(name)] == [written] * 2


@pytest.mark.parametrize("name", sorted(GENERATING & set(FOUR_RANKS)))
def test_four_engines_in_lock_step_write_what_one_writes(four: Group, name: str) -> None:
    written = greedy(copy.deepcopy(four.whole[name]))
    assert [report.token_ids for report in four.of(name)] == [written] * 4


def test_each_rank_holds_its_share_of_the_weights(two: Group) -> None:
    whole = two.whole["even vocabulary"]
    parameters = {name: one.nbytes for name, one in whole.named_parameters()}
    norms = sum(parameters[name] for name in parameters if "norm" in name)
    # transformers up to 5.17 leaves embeddings whole that are not tied to the head.
    embedding = parameters["model.embed_tokens.weight"]
    shared = sum(parameters.values()) - norms - embedding
    held = [report.local_bytes - norms - shared // 2 for report in two.of("even vocabulary")]
    assert held in ([embedding // 2] * 2, [embedding] * 2)


def test_a_rank_holds_one_of_fewer_kv_heads_than_ranks(four: Group) -> None:
    # Of 2 KV heads of 16 elements, biases included, each of 4 ranks drops one in every layer.
    for name, per_head in (("two KV heads", 128), ("two KV heads, biases", 129)):
        model = four.whole[name]
        whole = {key: one.nbytes for key, one in model.named_parameters()}
        kv = sum(whole[key] for key in whole if "k_proj" in key or "v_proj" in key)
        assert kv == 3 * 2 * 2 * 16 * per_head * 4
        held = [report.local_bytes for report in four.of(name)]
        replicated = [key for key in whole if "norm" in key or "embed" in key or "lm_head" in key]
        rest = sum(whole.values()) - kv - sum(whole[key] for key in replicated)
        assert held == [kv // 2 + rest // 4 + sum(whole[key] for key in replicated)] * 4


@pytest.mark.parametrize("name", ["tied", "tied, even vocabulary"])
def test_tied_embeddings_stay_tied(two: Group, name: str) -> None:
    assert [report.is_tied for report in two.of(name)] == [True, True]
    assert [report.is_tied for report in two.of("llama")] == [False, False]


def test_a_share_looks_like_a_whole_model_to_the_engine(two: Group) -> None:
    for name, (config, _, _) in TWO_RANKS.items():
        for report in two.of(name):
            assert report.vocab_size == config.vocab_size
            assert report.dtype == torch.float32
            assert report.device == torch.device("cpu")
            assert report.same_environment


def test_the_fused_decoder_says_that_a_share_is_not_for_it(two: Group) -> None:
    for report in two.of("llama"):
        assert report.fused_refusal == "its weights are sharded over 2 ranks"


def test_fused_on_is_an_error_for_a_share() -> None:
    model = torch.nn.Linear(1, 1)
    mark_share(model, RankShare(0, 2, has_whole_heads=False))
    config, unused = EngineConfig(fused="on"), cast(Any, None)
    with pytest.raises(ConfigError, match=r"fused is 'on'; .* sharded over 2 ranks"):
        choose_fused(model, unused, unused, config, 1)


def test_compiling_is_refused_with_several_ranks() -> None:
    with pytest.raises(ConfigError, match="compile is True and tensor_parallel_size is 2"):
        EngineConfig(compile=True, tensor_parallel_size=2)


def test_every_rank_refuses_a_model_without_a_plan(two: Group) -> None:
    for reports in two.reports:
        kind, text = reports["gpt2"].error
        assert kind == "UnsupportedModelError"
        assert f"{PLAN_CHECK}: transformers {hf.__version__} has none for GPT2Config" in text


@pytest.mark.parametrize("name", FORGOTTEN)
def test_every_rank_refuses_a_plan_that_misses_a_rule(two: Group, name: str) -> None:
    for reports in two.reports:
        kind, text = reports[name].error
        assert kind == "UnsupportedModelError"
        assert f"{PLAN_CHECK}: {FORGOTTEN[name][1]}" in text


@pytest.mark.parametrize("name", TWO_RANKS)
def test_every_rank_refuses_a_model_on_which_the_ranks_disagree(two: Group, name: str) -> None:
    for report in two.of(name):
        assert f"m is not supported: {PLAN_CHECK}: hidden states differ between ranks by" in (
            report.disagreement
        )


def test_every_rank_refuses_a_checkpoint_with_gaps(two: Group) -> None:
    for reports in two.reports:
        kind, text = reports["lacking"].error
        assert kind == "ConfigError"
        assert "missing keys: model.layers.1.self_attn.q_proj.weight" in text


def test_a_whole_model_has_no_share() -> None:
    model = torch.nn.Linear(1, 1)
    assert share_of(model) is None
    share = RankShare(1, 4, has_whole_heads=False)
    mark_share(model, share)
    assert share_of(model) == share
    assert [share.num_kv_heads(num) for num in (1, 2, 4, 8)] == [1, 1, 1, 2]
    assert RankShare(1, 4, has_whole_heads=True).num_kv_heads(2) == 2


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        (shape("llama", 4, 2), 8, "is 8; 'm' has 4 attention heads"),
        (shape("llama", 4, 2), 3, "is 3; 'm' has num_attention_heads 4"),
        (shape("llama", 12, 3), 2, "is 2; 'm' has 3 KV heads"),
        (shape("llama", 12, 4), 6, "is 6; 'm' has 4 KV heads"),
        (shape("llama", 4, 4, intermediate_size=66), 4, "is 4; 'm' has intermediate_size 66"),
        (shape("phi3", 4, 4, intermediate_size=66), 4, "is 4; 'm' has intermediate_size 66"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_an_error(
    config: Any, size: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size " + reason):
        check_shardable("m", config, size)


def unknown_style() -> Any:
    config = shape("llama", 4, 2)
    config.base_model_tp_plan = {"layers.*.self_attn": "sequence_parallel"}
    return config


def packed() -> Any:
    config = shape("llama", 4, 1)
    config.base_model_tp_plan = {"layers.*.self_attn.qkv_proj": "colwise"}
    return config


def differing() -> Any:
    config = shape("llama", 4, 2)
    vars(config)["num_key_value_heads"] = [2, 2, 1]  # as if its class had values per layer
    return config


def quantised() -> Any:
    config = shape("llama", 4, 2)
    config.quantization_config = {"quant_method": "gptq"}
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIGS["gpt2"](), "has none for GPT2Config"),
        (CONFIGS["opt"](), "has none for OPTConfig"),
        (unknown_style(), "layers.* is sharded as 'sequence_parallel'; supported: "),
        (packed(), "qkv_proj packs 1 KV heads with others, so 2 ranks cannot have one each"),
        (differing(), r"num_key_value_heads is \(2, 2, 1\); it must be the same in all layers"),
        (quantised(), "its weights are quantised"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        check_shardable("m", config, 2)
    assert (caught.value.model, caught.value.check) == ("m", PLAN_CHECK)
    check_shardable("m", config, 1)

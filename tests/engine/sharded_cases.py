"""Tiny checkpoints to shard, and what a rank is asked about each of them.

Owns: nothing.  Thread-safety: none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.engine.conftest import CONFIGS, VOCAB_SIZE
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams, UnsupportedModelError
from vmalloc.engine.cache_factory import CacheFactory
from vmalloc.engine.devices import module_device
from vmalloc.engine.fused.choice import choose_fused
from vmalloc.engine.model_loader import context_tokens, vocab_size
from vmalloc.engine.probe import probe_model, restore_attention
from vmalloc.engine.tensor_parallel.sharded_model import check_ranks_agree, load_sharded_model

CPU = torch.device("cpu")
TOKEN_IDS = [1, 2, 3, 50, 60, 70, 80, 3, 9, 11, 4, 6, 90, 8, 7, 5]
"""Longer than the windows of the tiny models."""
PROMPTS = [[5, 9, 77], TOKEN_IDS, [3] * 9]
NUM_NEW_TOKENS = 8


@dataclass
class RankReport:
    """What one rank found.

    Attributes:
        error: class and text of what loading or probing raised; the rest is empty then.
        logits: ``[num_tokens, vocab_size]`` under the model's own eager attention.
        num_heads, num_kv_heads: that reached attention in the probe.
        local_bytes: of the weights that this process holds.
        fused_refusal: why the fused decoder does not compute it.
        disagreement: what is said of it once another rank has changed a weight.
        token_ids: greedy completions of ``PROMPTS`` by an engine.
    """

    error: tuple[str, str] | None = None
    logits: Any = None
    num_heads: int = 0
    num_kv_heads: int = 0
    vocab_size: int = 0
    dtype: Any = None
    device: Any = None
    local_bytes: int = 0
    is_tied: bool = False
    fused_refusal: Any = None
    same_environment: bool = False
    disagreement: str = ""
    token_ids: list[list[int]] = field(default_factory=list)


def save_model(config: Any, folder: Path, *, seed: int = 0) -> Any:
    """Save a seeded random model with biases and norms that are not trivial, and return it."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def shape(name: str, num_heads: int, num_kv_heads: int, **settings: Any) -> Any:
    """``CONFIGS[name]`` with other heads, of 16 elements, and widths that 4 ranks can share."""
    config = CONFIGS[name]().to_dict()
    config |= {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    config |= {"hidden_size": 16 * num_heads, "intermediate_size": 64, "head_dim": 16, **settings}
    return type(CONFIGS[name]()).from_dict(config)


@torch.inference_mode()
def eager_logits(model: Any) -> torch.Tensor:
    """``[num_tokens, vocab_size]`` of ``TOKEN_IDS``."""
    model.set_attn_implementation("eager")
    input_ids = torch.tensor([[token_id % VOCAB_SIZE for token_id in TOKEN_IDS]])
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits[0]
    return logits.clone()


def greedy(model: Any) -> list[list[int]]:
    """What an engine writes after each of ``PROMPTS``."""
    with LLMEngine(model, None, EngineConfig(max_num_seqs=4)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS)
        for idx, prompt in enumerate(PROMPTS):
            engine.add_request(str(idx), prompt, params)
        written: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                written[output.request_id] = list(output.outputs[0].token_ids)
    return [written[str(idx)] for idx in range(len(PROMPTS))]


def examine_all(
    rank: int,
    size: int,
    folders: dict[str, str],
    probed: set[str],
    generating: set[str],
    forgotten: dict[str, str],
) -> dict[str, RankReport]:
    """A report on each checkpoint; those in ``probed`` and ``generating`` get a closer look.

    ``forgotten`` are rules that the plan of a model's class lacks while it is loaded.
    """
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    reports = {}
    for key, folder in folders.items():
        try:
            with forgetting(folder, forgotten.get(key)):
                reports[key] = _examine(rank, size, folder, key in probed)
            if key in generating:
                model = load_sharded_model(folder, "float32", CPU, rank, size)
                reports[key].token_ids = greedy(model)
        except Exception as error:
            reports[key] = RankReport(error=(type(error).__name__, str(error)))
    return reports


@contextmanager
def forgetting(folder: str, rule: str | None) -> Iterator[None]:
    """Inside, the plan of a checkpoint's config class lacks a rule."""
    config_class: Any = type(hf.AutoConfig.from_pretrained(folder))
    plan = config_class.base_model_tp_plan
    if rule is not None:
        config_class.base_model_tp_plan = {key: plan[key] for key in plan if key != rule}
        assert config_class.base_model_tp_plan != plan
    try:
        yield
    finally:
        config_class.base_model_tp_plan = plan


def _examine(rank: int, size: int, folder: str, is_probed: bool) -> RankReport:
    before = dict(os.environ)
    model = load_sharded_model(folder, "float32", CPU, rank, size)
    any_model: Any = model
    report = RankReport(
        same_environment=dict(os.environ) == before,
        logits=eager_logits(model),
        vocab_size=vocab_size(model),
        dtype=next(model.parameters()).dtype,
        device=module_device(model, "cpu"),
        local_bytes=sum(
            getattr(one, "to_local", lambda one=one: one)().nbytes for one in model.parameters()
        ),
        is_tied=any_model.get_output_embeddings().weight is any_model.get_input_embeddings().weight,
    )
    if is_probed:
        caches = CacheFactory(CPU, "virtual", "auto")
        seen = probe_model(model, caches)
        report.num_heads, report.num_kv_heads = seen.num_heads, seen.layers[0].num_kv_heads
        report.fused_refusal = choose_fused(
            model, seen, caches, EngineConfig(), context_tokens(model)
        )
        restore_attention(model, "eager")
        report.disagreement = _disagreement(rank, model)
    return report


def _disagreement(rank: int, model: Any) -> str:
    check_ranks_agree("m", model)
    *_, norm = (weight for name, weight in model.named_parameters() if "norm" in name)
    with torch.no_grad():
        norm.add_(float(rank))
    try:
        check_ranks_agree("m", model)
    except UnsupportedModelError as error:
        return str(error)
    return ""

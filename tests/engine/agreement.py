"""A workload of every decoding method, what it must give, and engines to run it on.

What it must give comes from the model alone, without a KV cache: ``model.generate`` for greedy and
beams; for sampling, every token from a forward pass over the whole sequence. So two backends cannot
agree on a common mistake.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch

from tests.engine.running import PAGE, step
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.decode_graphs import Recorder
from vmalloc.engine.sampler import sample
from vmalloc.engine.sequence import Sequence

KINDS = ("virtual", "paged")
KERNELS = {"virtual": "cpu_contiguous", "paged": "cpu_block_table"}
SEEDS = range(5)
VOCAB_SIZE = 97
BLOCK = 4
MAX_SEQS = 14  # all of a workload at once

# Model and cache settings.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Rows of 4,800 bytes: each straddles pages of 4 KiB.
    "5x3x40": ("llama-5x3x40", {}),
    # Rows of 960 bytes in five buffers: pages end within every fifth row.
    # And computed by the model itself, the others by the fused decoder.
    "5x3x40, per layer": ("llama-5x3x40", {"layers_per_group": 1, "fused": "off"}),
    # Rows of 1,024 bytes: four are a page, and a block.
    "4x2x16": ("llama-4x2x16", {}),
}

ROW_SHAPES = ("5x3x40", "4x2x16")

Request = tuple[list[int], SamplingParams]

_SAMPLED = partial(SamplingParams, logprobs=1, temperature=0.9)
METHODS: dict[str, Callable[[int], SamplingParams]] = {
    "greedy": lambda seed: SamplingParams(temperature=0.0, max_tokens=10, logprobs=1),
    "sampled": lambda seed: _SAMPLED(seed=seed, top_k=30, top_p=0.95, max_tokens=12),
    # Stop tokens let completions of one request end at different steps.
    "n=4": lambda seed: _SAMPLED(n=4, seed=seed, max_tokens=10, stop_token_ids=[3, 5, 7, 11]),
    "best_of": lambda seed: _SAMPLED(n=2, best_of=4, seed=seed, min_p=0.01, max_tokens=8),
    "beam": lambda seed: SamplingParams(
        n=4, use_beam_search=True, temperature=0.0, max_tokens=8, logprobs=1
    ),
}


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(count)]


def workload(seed: int, methods: Iterable[str] = METHODS) -> dict[str, Request]:
    """A request per method, by name; always the same for one seed and method.

    Prompts are of odd lengths: none ends where a block does, so forks copy.
    """
    requests = {}
    for method in methods:
        rng = random.Random(f"{seed} {method}")
        params = METHODS[method](rng.randrange(1 << 32))
        requests[method] = random_tokens(rng, 2 * rng.randint(7, 23) + 1), params
    return requests


def with_common_starts(seed: int, requests: dict[str, Request]) -> dict[str, Request]:
    """A second wave: prompts that start as the longest of ``requests`` and part within a block."""
    rng = random.Random(seed)
    base = max((prompt for prompt, _ in requests.values()), key=len)
    second = {}
    for name, (_, params) in workload(seed + 100).items():
        cut = BLOCK * rng.randint(3, 5) + rng.randint(1, BLOCK - 1)
        own = random_tokens(rng, rng.randint(2, 12))
        own[0] = (base[cut] + 1) % VOCAB_SIZE
        second[f"second {name}"] = base[:cut] + own, params
    return second


@dataclass
class Completion:
    """Tokens, and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


@cache
def make_reference(tiny_model: Callable[[str], Any]) -> Reference:
    """The same one for all files of a test run: they ask for much the same."""
    return Reference(tiny_model)


class Reference:
    """What requests must give, computed once each by the model alone."""

    def __init__(self, tiny_model: Callable[[str], Any]) -> None:
        self._tiny_model = tiny_model
        self._known: dict[Any, list[Completion]] = {}

    def __call__(self, name: str, requests: dict[str, Request]) -> dict[str, list[Completion]]:
        return {key: self._one(name, *request) for key, request in requests.items()}

    @torch.inference_mode()
    def _one(self, name: str, prompt: list[int], params: SamplingParams) -> list[Completion]:
        key = name, tuple(prompt), params
        if key not in self._known:
            model = self._tiny_model(name)
            is_searched = params.use_beam_search or params.is_greedy
            written = (_search if is_searched else _draw)(model, prompt, params)
            found = [Completion(ids, _forced_logprobs(model, prompt, ids)) for ids in written]
            if params.width > params.n and not is_searched:
                found.sort(key=lambda one: -sum(one.logprobs))
            self._known[key] = found[: params.n]
        return self._known[key]


def _search(model: Any, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """Greedy tokens, or those of beams, as Hugging Face finds them."""
    rows = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.width,
        num_return_sequences=params.n,
        max_new_tokens=params.max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return [row[len(prompt) :].tolist() for row in rows]


def _draw(model: Any, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """Sampled tokens of each choice, each from a pass over all that comes before it."""
    seqs = [
        Sequence(
            choice_idx,
            "reference",
            prompt,
            params,
            max_tokens=params.max_tokens or 0,
            seed=params.seed or 0,
            choice_idx=choice_idx,
        )
        for choice_idx in range(params.width)
    ]
    active = seqs
    for _ in range(params.max_tokens or 0):
        logits = model(torch.tensor([seq.token_ids for seq in active])).logits[:, -1]
        for seq, token_id in zip(active, sample(active, logits).token_ids, strict=True):
            assert token_id is not None
            seq.token_ids.append(token_id)
        active = [seq for seq in active if seq.token_ids[-1] not in (params.stop_token_ids or ())]
        if not active:
            break
    return [seq.output_token_ids for seq in seqs]


def _forced_logprobs(model: Any, prompt: list[int], token_ids: list[int]) -> list[float]:
    """Log-probabilities of written tokens, from one pass over all of them."""
    logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    scores = logits.float().log_softmax(-1)
    return scores.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


class Engines:
    """Engines by shape, backend and settings, each made once and left empty after every use.

    ``recorder``: what they send decodes through; None: nothing.
    """

    def __init__(self, tiny_model: Callable[[str], Any], recorder: Recorder | None = None) -> None:
        self._tiny_model = tiny_model
        self._recorder = recorder
        self._made: dict[Any, LLMEngine] = {}

    def __call__(self, shape: str, kind: str, **settings: Any) -> LLMEngine:
        key = shape, kind, *sorted(settings.items())
        engine = self._made.get(key)
        if engine is None:
            name, shape_settings = SHAPES[shape]
            defaults = {
                "kv_backend": kind,
                "page_size": PAGE,
                "block_size": BLOCK,
                "max_num_seqs": MAX_SEQS,
                "batch_invariant": True,
                "commit_ahead_tokens": 0,  # no thread: the same pages in every run
                **shape_settings,
            }
            config = EngineConfig(**{**defaults, **settings})
            model = copy.deepcopy(self._tiny_model(name))
            engine = LLMEngine(model, None, config, recorder=self._recorder)
            self._made[key] = engine
        engine.flush_prefix_cache()
        assert engine.kernel_name.startswith(KERNELS[kind])
        assert (engine.forward_name == "model") == (engine.config.fused == "off")
        return engine

    def close(self) -> None:
        for engine in self._made.values():
            engine.close()
        self._made.clear()


@dataclass
class Run:
    """What a run gave, and how much of each event happened in it.

    Attributes:
        outputs: by request.
        num_cut_prompts: prompts that a step computed some tokens of, and left some to the next.
        others: see ``KVCacheStats`` and ``SchedulerStats``.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    num_cut_prompts: int = 0
    cow_copies: int = 0
    aliased_pages: int = 0
    swap_in_pages: int = 0
    preempt_swap: int = 0
    preempt_recompute: int = 0

    @property
    def cached_tokens(self) -> dict[str, int]:
        """By request, the prompt tokens that were found in the cache."""
        return {name: output.num_cached_tokens for name, output in self.outputs.items()}


def run(
    engine: LLMEngine,
    waves: Iterable[dict[str, Request]],
    *,
    steps_between: int = 3,
    disturb: Callable[[LLMEngine], None] = lambda engine: None,
) -> Run:
    """Add the waves a few steps apart and step to the end; the books are checked every step.

    ``disturb`` is called before each step.
    """
    kv, queues = engine.kv_stats(), engine.stats()
    result = Run()
    pending = list(waves)
    num_steps = 0
    while pending or engine.has_unfinished_requests():
        if pending and num_steps % steps_between == 0:
            for name, (prompt, params) in pending.pop(0).items():
                engine.add_request(name, prompt, params)
        disturb(engine)
        step(engine, result.outputs)
        num_steps += 1
        assert num_steps < 1000
        result.num_cut_prompts += sum(
            0 < group.root.num_computed_tokens < len(group.prompt_token_ids)
            for group in engine.scheduler.running
            if group.metrics.first_token_time is None
        )
    for name in ("cow_copies", "aliased_pages", "swap_in_pages"):
        setattr(result, name, getattr(engine.kv_stats(), name) - getattr(kv, name))
    for name in ("preempt_swap", "preempt_recompute"):
        setattr(result, name, getattr(engine.stats(), name) - getattr(queues, name))
    return result


def run_alone(engine: LLMEngine, requests: dict[str, Request]) -> Run:
    """Each request by itself in an empty cache; events are those of the last."""
    result = Run()
    for name, request in requests.items():
        engine.flush_prefix_cache()
        one = run(engine, [{name: request}])
        result.outputs.update(one.outputs)
    return result


def assert_shared(result: Run) -> None:
    assert result.aliased_pages > 0
    assert result.cow_copies > 0


def assert_agree(runs: dict[str, Run], expected: dict[str, list[Completion]]) -> None:
    """Every run gives the expected tokens, and logprobs within 1e-4 of them and of each other."""
    for kind, result in runs.items():
        assert set(result.outputs) == set(expected)
        for name, completions in expected.items():
            output = result.outputs[name]
            assert output.error is None, f"{kind}: {output.error}"
            ours = [one.token_ids for one in output.outputs]
            assert ours == [one.token_ids for one in completions], f"{name} on {kind}"
            for one, wanted in zip(output.outputs, completions, strict=True):
                assert chosen_logprobs(one) == pytest.approx(wanted.logprobs, abs=1e-4)
    first, *others = runs.values()
    for name in expected:
        wanted = [chosen_logprobs(one) for one in first.outputs[name].outputs]
        for other in others:
            ours = [chosen_logprobs(one) for one in other.outputs[name].outputs]
            for a, b in zip(ours, wanted, strict=True):
                assert a == pytest.approx(b, abs=1e-4)


def chosen_logprobs(completion: Any) -> list[float]:
    """Log-probabilities of the chosen tokens."""
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return [entry[token_id].logprob for entry, token_id in pairs]

"""The engine on a GPU writes what it writes on the CPU, with CUDA graphs and without.

Needs pytest, torch, transformers and vmalloc alone. Under ``TRITON_INTERPRET=1`` the same bodies
run on the CPU over the host driver, decodes through recordings that are plain calls.

Owns: nothing.  Thread-safety: single-threaded tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

from tests.engine.running import all_tokens, run_out, step
from tests.kernels.paged import DEVICE
from vmalloc.engine import LLM, EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.decode_graphs import EagerRecorder
from vmalloc.engine.model_loader import load_model, resolve_model_name
from vmalloc.errors import VmallocError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="torch sees no CUDA device"),
]

KINDS = ("virtual", "paged")
ON_GPU = DEVICE != "cpu"
CPU = torch.device("cpu")
VOCAB_SIZE = 512
MAX_LEN = 640
MIB = 1 << 20

# Share of the largest logit that a chosen token may be below the best one of the float32 model.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}


@cache
def tiny_llama() -> Any:
    """In float32 on the CPU: 32 KiB a token, so that 64 of them fill a page of 2 MiB."""
    return make_model(
        hf.LlamaConfig,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.05,
    )


@cache
def tiny_mixture() -> Any:
    """Its experts are picked by reading back a tensor, which no CUDA graph can hold."""
    return make_model(
        hf.MixtralConfig,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def make_model(config_class: Any, **shape: int | float) -> Any:
    """A random model of heads of 64 that never ends a text by itself."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **shape,
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 100, 61, 130, 7, 250, 33, 64][:count]
    return [
        torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


Make = Callable[..., LLMEngine]


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(model, dtype="bfloat16", kv_backend="paged")``: an engine on the device under test."""
    engines: list[LLMEngine] = []

    def make(model: Any, dtype: str = "float32", **settings: Any) -> LLMEngine:
        module = copy.deepcopy(model).to(DEVICE, getattr(torch, dtype))
        defaults = {
            "kv_cache_memory_bytes": 256 * MIB,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "cuda_graph_sizes": (1, 2, 4, 8),
        }
        is_eager = ON_GPU or settings.get("enforce_eager", False)
        config = EngineConfig(**{**defaults, **settings})
        engines.append(
            LLMEngine(module, None, config, recorder=None if is_eager else EagerRecorder())
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def greedy(max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def add(engine: LLMEngine, token_ids: list[list[int]], params: SamplingParams) -> None:
    for idx, prompt in enumerate(token_ids):
        engine.add_request(str(idx), prompt, params)


@torch.inference_mode()
def assert_greedy(model: Any, prompts: list[list[int]], written: Any, tolerance: float) -> None:
    """Every token is the best one after those before it, or as good as that."""
    for idx, prompt in enumerate(prompts):
        (token_ids,) = written[str(idx)]
        logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.amax(dim=-1)
        chosen = logits.gather(1, torch.tensor(token_ids).unsqueeze(1))[:, 0]
        gap = (best - chosen) / logits.abs().amax(dim=-1)
        assert float(gap.max()) <= tolerance, f"prompt {idx}, token {int(gap.argmax())}"


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_tokens_are_those_of_the_cpu(
    dtype: str, kind: str, enforce_eager: bool, make: Make
) -> None:
    if dtype == "float16" and not ON_GPU:
        pytest.skip("no kernel of the CPU takes float16")
    engine = make(tiny_llama(), dtype, kv_backend=kind, enforce_eager=enforce_eager)
    add(engine, prompts(), greedy())
    finished: dict[str, Any] = {}
    while engine.stats().num_waiting or not engine.scheduler.running:
        step(engine, finished)
    mapped = engine.kv_stats().map_calls
    written = all_tokens(run_out(engine, finished))
    assert_greedy(tiny_llama(), prompts(), written, TOLERANCE[dtype])
    if enforce_eager:
        assert engine.decode_graphs is None
    else:
        assert engine.decode_graphs is not None
        assert engine.decode_graphs.num_replayed > 30
    if kind == "virtual":  # pages were mapped between replays of the same graph
        assert engine.kv_stats().map_calls > mapped


METHODS = {
    "n=4": SamplingParams(n=4, temperature=0.8, seed=3, max_tokens=10),
    "top-k and top-p": SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=4, max_tokens=10),
    "min-p and typical": SamplingParams(
        temperature=1.1, min_p=0.02, typical_p=0.9, seed=5, max_tokens=10
    ),
    "beams": SamplingParams(n=2, best_of=4, use_beam_search=True, temperature=0.0, max_tokens=10),
    "penalties": SamplingParams(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        max_tokens=10,
    ),
    "bias and masks": SamplingParams(
        temperature=0.7,
        seed=6,
        max_tokens=10,
        logit_bias={5: 2.0},
        allowed_token_ids=list(range(0, VOCAB_SIZE, 3)),
    ),
    "logprobs": SamplingParams(temperature=0.0, max_tokens=10, logprobs=3, prompt_logprobs=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_draws_what_it_draws_on_the_cpu(kind: str, make: Make) -> None:
    config = EngineConfig(max_num_seqs=16, kv_cache_memory_bytes=256 * MIB, device="cpu")
    with LLMEngine(copy.deepcopy(tiny_llama()), None, config) as on_cpu:
        outputs = []
        for engine in (on_cpu, make(tiny_llama(), kv_backend=kind, max_num_seqs=16)):
            for idx, (name, params) in enumerate(METHODS.items()):
                engine.add_request(name, prompts()[idx % 6], params)
            outputs.append(run_out(engine))
    expected, found = outputs
    assert all_tokens(found) == all_tokens(expected)
    for ours, theirs in zip(
        found["logprobs"].outputs[0].logprobs,
        expected["logprobs"].outputs[0].logprobs,
        strict=True,
    ):
        assert list(ours) == list(theirs)
        for token_id, entry in ours.items():
            assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_outlive_sleep(kind: str, make: Make) -> None:
    engine = make(tiny_llama(), kv_backend=kind, swap_space_bytes=256 * MIB)
    add(engine, prompts(), greedy())
    finished: dict[str, Any] = {}
    for _ in range(20):
        step(engine, finished)
    assert engine.decode_graphs is not None
    replayed = engine.decode_graphs.num_replayed
    if kind == "paged" and ON_GPU:  # its blocks are torch tensors, which give nothing back
        with pytest.raises(VmallocError, match="a paged one on cuda:0 gave no memory back"):
            engine.sleep()
    else:
        engine.sleep()
        assert engine.kv_stats().created_pages == 0
        assert engine.wake()
    written = all_tokens(run_out(engine, finished))
    assert_greedy(tiny_llama(), prompts(), written, TOLERANCE["float32"])
    assert engine.decode_graphs.num_replayed > replayed > 0


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_preempted_requests_go_on_as_if_nothing_was(kind: str, mode: str, make: Make) -> None:
    engine = make(
        tiny_llama(),
        kv_backend=kind,
        preemption_mode=mode,
        kv_cache_memory_bytes=20 * MIB,
        swap_space_bytes=256 * MIB,
        page_size=None if ON_GPU else 2 * MIB,
    )
    add(engine, prompts(8), greedy(60))
    written = all_tokens(run_out(engine))
    assert getattr(engine.stats(), f"preempt_{mode}") > 0
    assert_greedy(tiny_llama(), prompts(8), written, TOLERANCE["float32"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_writes_on_a_gpu_what_it_writes_on_the_cpu(kind: str) -> None:
    texts = ["def ", "import ", "class Stack:"]
    reference = load_model(resolve_model_name("demo"), "float32", CPU)
    with LLM(
        "demo",
        device=str(DEVICE),
        dtype="float32",
        kv_backend=kind,  # type: ignore[arg-type]
        max_num_seqs=4,
        kv_cache_memory_bytes=256 * MIB,
    ) as llm:
        outputs = llm.generate(texts, greedy(48), use_tqdm=False)
        assert llm.config.device.startswith("cuda" if ON_GPU else "cpu")
        token_ids = [llm.get_tokenizer().encode(text) for text in texts]
    written = {str(idx): [output.outputs[0].token_ids] for idx, output in enumerate(outputs)}
    assert_greedy(reference, token_ids, written, TOLERANCE["float32"])


@pytest.mark.skipif(not ON_GPU, reason="the CPU's cap goes by the host's memory")
def test_without_a_cap_kv_takes_what_is_left_of_its_share(make: Make) -> None:
    engine = make(
        tiny_llama(),
        "bfloat16",
        kv_cache_memory_bytes=None,
        gpu_memory_utilization=0.2,
        max_num_seqs=4096,
        max_num_batched_tokens=4096,
        cuda_graph_sizes=(8,),
    )
    total = torch.cuda.get_device_properties(0).total_memory
    cap = engine.config.kv_cache_memory_bytes
    assert cap is not None
    assert 0.1 * total < cap < 0.2 * total


@pytest.mark.skipif(not ON_GPU, reason="tests/engine has it on the CPU")
def test_a_compiled_model_writes_the_same(make: Make) -> None:
    engine = make(tiny_llama(), compile=True, cuda_graph_sizes=(2,), max_num_seqs=2)
    add(engine, prompts(2), greedy())
    written = all_tokens(run_out(engine))
    assert_greedy(tiny_llama(), prompts(2), written, TOLERANCE["float32"])


def test_a_model_that_may_not_be_captured_writes_all_the_same(make: Make) -> None:
    """Last in this file: it is about what a failed capture leaves behind."""
    engine = make(tiny_mixture())
    add(engine, prompts(), greedy(20))
    written = all_tokens(run_out(engine))
    assert_greedy(tiny_mixture(), prompts(), written, TOLERANCE["float32"])
    after = make(tiny_llama())
    add(after, prompts(), greedy(20))
    assert_greedy(tiny_llama(), prompts(), all_tokens(run_out(after)), TOLERANCE["float32"])
    assert after.decode_graphs is not None
    assert after.decode_graphs.num_replayed > 0

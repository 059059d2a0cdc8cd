"""The engine under pressure: preemption, aborts, poison past the end, bad input."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers as hf

import vmalloc.engine.generation as generation
from vmalloc.engine import (
    LLM,
    ConfigError,
    EngineConfig,
    LLMEngine,
    RequestOutputKind,
    SamplingParams,
)
from vmalloc.engine.kv_attention import ATTENTION_NAME
from vmalloc.engine.model_loader import resolve_model_name
from vmalloc.engine.tokenizer import Detokenizer, load_tokenizer
from vmalloc.errors import ClosedError, VmallocError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PAGE = 4096


def requests(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def generate(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[Any]:
    return llm.generate(requests(prompts), params, use_tqdm=False)


def token_ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("layers_per_group", [1, None], ids=["per-layer", "interleaved"])
@pytest.mark.parametrize("name", ["llama", "llama-5x3x40"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_pool_preempts_and_changes_no_output(
    name: str,
    layers_per_group: int | None,
    temperature: float,
    tiny_model: Any,
    prompts: list[list[int]],
) -> None:
    model = tiny_model(name)
    params = [
        SamplingParams(temperature=temperature, max_tokens=40, seed=idx)
        for idx in range(len(prompts))
    ]
    settings: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "page_size": PAGE,
        "layers_per_group": layers_per_group,
        "batch_invariant": True,
    }
    with LLM(model, **settings) as llm:
        expected = token_ids(generate(llm, prompts, params))
        assert llm.engine.scheduler.num_preemptions == 0
        token_bytes = llm.engine.backend.config.token_bytes
    # A little more than the longest request: 60 prompt tokens and 40 new ones, and page tails.
    num_groups = 1 if layers_per_group is None else len(llm.engine.backend.config.layers)
    cap = 110 * token_bytes + 2 * num_groups * PAGE
    with LLM(model, kv_cache_memory_bytes=cap, **settings) as llm:
        outputs = generate(llm, prompts, params)
        assert llm.engine.scheduler.num_preemptions > 0
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        llm.engine.backend.check_invariants()
        assert llm.kv_stats().created_pages * PAGE <= cap
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * len(prompts)
    assert token_ids(outputs) == expected


def test_a_request_larger_than_the_pool_fails_alone(
    tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    short, too_long, grows = [1] * 5, [2] * 100, [3] * 10
    with LLM(model, page_size=PAGE, kv_cache_memory_bytes=8 * PAGE, max_num_seqs=4) as llm:
        assert "less than max_model_len" in caplog.text
        limit = llm.engine.backend.max_seq_tokens()
        assert limit < 100
        params = SamplingParams(temperature=0.0, max_tokens=None, min_tokens=0)
        outputs = generate(llm, [short, too_long, grows, short], [GREEDY, GREEDY, params, GREEDY])
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == ["length", "error", "error", "length"]
        assert "100 tokens" in str(outputs[1].error)
        assert outputs[1].outputs[0].token_ids == []
        assert "ran out of KV memory" in str(outputs[2].error)
        assert len(outputs[2].outputs[0].token_ids) == limit - 10 + 1
        assert llm.kv_stats().num_live_seqs == 0
        llm.engine.backend.check_invariants()


@pytest.mark.parametrize("name", ["llama", "llama-5x3x40", "gemma2"])
@pytest.mark.parametrize("layers_per_group", [1, None], ids=["per-layer", "interleaved"])
def test_nan_past_each_sequences_end_never_reaches_an_output(
    name: str, layers_per_group: int | None, tiny_model: Any, prompts: list[list[int]]
) -> None:
    model = tiny_model(name)
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=3)
    settings: dict[str, Any] = {"max_num_seqs": 8, "layers_per_group": layers_per_group}
    with LLM(model, **settings) as llm:
        expected = generate(llm, prompts, params)
    with LLM(model, **settings) as llm:
        backend: Any = llm.engine.backend
        step, num_poisoned = llm.engine.step, 0

        def poisoned_step() -> Any:
            nonlocal num_poisoned
            backend.wait_worker()
            for seq in [g.root for g in llm.engine.scheduler.running]:
                slot, start = backend.slot_of(seq.seq_id), backend.seq_len(seq.seq_id)
                end = min(backend.mapped_rows(seq.seq_id), backend.config.max_seq_len)
                for layer_idx in range(len(backend.config.layers)):
                    for cache in backend.layer_views(layer_idx):
                        cache[slot, start:end] = torch.nan
                num_poisoned += end - start
            return step()

        llm.engine.step = poisoned_step  # type: ignore[method-assign]
        outputs = generate(llm, prompts, params)
        assert num_poisoned > 1000
    for poisoned, clean in zip(outputs, expected, strict=True):
        assert poisoned.outputs[0].token_ids == clean.outputs[0].token_ids
        assert poisoned.outputs[0].logprobs == clean.outputs[0].logprobs


def test_seeded_sampling_does_not_depend_on_batch_mates(
    tiny_model: Any, prompts: list[list[int]]
) -> None:
    model = tiny_model("llama")
    params = [
        SamplingParams(
            seed=7 * idx, max_tokens=12, temperature=0.7 + idx / 10, top_k=idx, top_p=0.9
        )
        for idx in range(len(prompts))
    ]
    with LLM(model, batch_invariant=True, seed=1) as llm:
        together = token_ids(generate(llm, prompts, params))
    with LLM(model, batch_invariant=True, seed=2) as llm:
        alone = [
            token_ids(generate(llm, [prompt], one))[0]
            for prompt, one in zip(prompts, params, strict=True)
        ]
    assert together == alone


def test_unseeded_requests_follow_the_engines_seed(tiny_model: Any) -> None:
    written = []
    for seed in (1, 1, 2):
        with LLM(tiny_model("llama"), seed=seed) as llm:
            written.append(token_ids(generate(llm, [[1, 2]] * 3, SamplingParams(max_tokens=12))))
    assert written[0] == written[1] != written[2]
    assert len(set(map(tuple, written[0]))) == 3


def test_abort_frees_waiting_and_running_requests(tiny_model: Any) -> None:
    with LLMEngine(tiny_model("llama"), config=EngineConfig(max_num_seqs=2)) as engine:
        for idx in range(4):
            engine.add_request(str(idx), [1, 2, 3], GREEDY)
        engine.step()
        assert engine.kv_stats().num_live_seqs == 2
        engine.abort_request("3")
        engine.abort_request(["0", "unknown"])
        assert engine.kv_stats().num_live_seqs == 1
        finished = []
        while engine.has_unfinished_requests():
            finished += [out.request_id for out in engine.step() if out.is_finished]
        assert finished == ["1", "2"]
        assert engine.kv_stats().num_live_seqs == 0
        engine.add_request("0", [1], GREEDY)  # the name is free again
        engine.abort_request("0")
        engine.backend.check_invariants()


def test_steps_report_all_or_only_what_is_new(tiny_model: Any) -> None:
    with LLMEngine(tiny_model("llama")) as engine:
        for kind in RequestOutputKind:
            params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=0, output_kind=kind)
            engine.add_request(kind.value, [4, 5, 6], params)
        seen: dict[str, list[list[int]]] = {kind.value: [] for kind in RequestOutputKind}
        while engine.has_unfinished_requests():
            for output in engine.step():
                completion = output.outputs[0]
                assert len(completion.logprobs or []) == len(completion.token_ids)
                seen[output.request_id].append(completion.token_ids)
    (final,) = seen["final_only"]
    assert seen["cumulative"] == [final[: idx + 1] for idx in range(5)]
    assert seen["delta"] == [[token_id] for token_id in final]


def test_end_tokens_stop_unless_ignored_or_too_early(tiny_model: Any) -> None:
    with LLM(tiny_model("llama")) as llm:
        (free,) = generate(llm, [[9, 8, 7]])
        written = free.outputs[0].token_ids
        stop = written[3]
        first = written.index(stop) + 1

        def run(**settings: Any) -> Any:
            params = SamplingParams(temperature=0.0, max_tokens=12, **settings)
            return generate(llm, [[9, 8, 7]], params)[0].outputs[0]

        stopped = run(stop_token_ids=[stop])
        assert stopped.token_ids == written[:first]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        later = run(stop_token_ids=[stop], min_tokens=8)
        assert len(later.token_ids) >= 8
        assert stop not in later.token_ids[:7]
        llm.engine._reader.end_token_ids = frozenset([stop])
        ended = run()
        assert (ended.token_ids, ended.stop_reason) == (written[:first], None)
        assert run(ignore_eos=True).token_ids == written


def test_the_context_ends_a_request(tiny_model: Any) -> None:
    with LLM(tiny_model("llama"), max_model_len=20) as llm:
        (output,) = generate(llm, [[1] * 15], SamplingParams(temperature=0.0, max_tokens=None))
        assert len(output.outputs[0].token_ids) == 5
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_tokens": -1}, "max_tokens is -1.*at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0.*at least 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5.*max_tokens, 4"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "empty string"),
        ({"stop": ["a"], "detokenize": False}, "detokenize"),
        ({"stop_token_ids": [-1]}, "stop_token_ids holds -1"),
    ],
)
def test_sampling_params_reject_what_cannot_work(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SamplingParams(**settings)


def test_an_unknown_sampling_parameter_is_an_error() -> None:
    with pytest.raises(TypeError, match="presence"):
        SamplingParams(presence=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {}, "prompt is empty.*at least 1"),
        ("", {}, "prompt is empty.*at least 1"),
        ({"prompt_token_ids": []}, {}, "prompt is empty"),
        ("text", {}, "no tokenizer"),
        ({"text": "x"}, {}, r"keys \['text'\]"),
        (7, {}, "prompt is a int"),
        ([1, "a"], {}, "holds 'a'"),
        ([1, 97], {}, "token id 97.*between 0 and 96"),
        ([-1], {}, "token id -1"),
        ([1] * 160, {}, "160 tokens.*max_model_len, 160"),
        ([1] * 999, {}, "999 tokens.*max_model_len, 160"),
        ([1], {"logprobs": 21}, "logprobs is 21.*max_logprobs, 20"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ([1], {"stop_token_ids": [97]}, "stop_token_ids holds 97"),
    ],
)
def test_a_bad_request_takes_nothing(
    prompt: Any, params: dict[str, Any], text: str, tiny_model: Any
) -> None:
    with LLMEngine(tiny_model("llama"), config=EngineConfig(max_num_seqs=2)) as engine:
        with pytest.raises(ConfigError, match=text):
            engine.add_request("0", prompt, SamplingParams(**params))
        assert not engine.has_unfinished_requests()
        assert engine.kv_stats().created_pages == 0
        engine.add_request("0", [1], GREEDY)
        with pytest.raises(ConfigError, match="live request"):
            engine.add_request("0", [1], GREEDY)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'.*float32"),
        ({"kv_backend": "paged", "block_size": 0}, "block_size is 0"),
        ({"preemption_mode": "drop"}, "preemption_mode is 'drop'.*recompute"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo'.*priority"),
        ({"commit_policy": "all"}, "commit_policy is 'all'.*oracle"),
        ({"swap_space_bytes": -1}, "swap_space_bytes is -1"),
        ({"kv_backend": "magic"}, "magic"),
        ({"device": "tpu"}, "device is 'tpu'.*cuda:N"),
        ({"device": "cuda:x"}, "device is 'cuda:x'.*cuda:N"),
        ({"device": "cuda"}, "device is 'cuda'.*model that was passed is on cpu"),
        ({"kv_driver": "disk"}, "kv_driver is 'disk'.*host, cuda, null"),
        ({"kv_driver": "null"}, "kv_driver is 'null'.*only counts"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"cuda_graph_sizes": ()}, "cuda_graph_sizes is empty"),
        ({"cuda_graph_sizes": (4, 0)}, "cuda_graph_sizes is 0"),
        ({"cuda_graph_sizes": (4, 65)}, "cuda_graph_sizes holds 65.*max_num_seqs, 64"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 16}, "max_num_batched_tokens is 16.*32"),
        ({"max_model_len": 161}, "max_model_len is 161.*160"),
        ({"page_size": 5000}, "5000"),
        ({"layers_per_group": 4}, "layers_per_group is 4.*3"),
        ({"kv_cache_memory_bytes": 1}, "1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_setting_is_named_and_the_model_let_go(
    settings: dict[str, Any], text: str, tiny_model: Any
) -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=text):
        LLM(model, **settings)
    assert model.config._attn_implementation == before


def test_nothing_is_committed_at_start_and_all_is_given_back(tiny_model: Any) -> None:
    with LLM(tiny_model("llama")) as llm:
        assert llm.kv_stats().created_pages == 0
        assert llm.kv_stats().reserved_bytes > 0
        generate(llm, [[1, 2, 3]])
        assert llm.kv_stats().created_pages > 0
    with pytest.raises(ClosedError):
        llm.engine.step()
    with pytest.raises(ClosedError):
        llm.engine.add_request("0", [1])


def test_a_model_in_use_cannot_run_on_its_own(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with LLM(model, max_num_seqs=2), pytest.raises(VmallocError, match="outside an engine step"):
        model(torch.tensor([[1, 2]]))


def test_a_mixture_of_experts_cannot_be_batch_invariant(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match="batch_invariant is True"):
        LLM(tiny_model("mixtral"), batch_invariant=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_request_and_not_the_engine(
    temperature: float, tiny_model: Any
) -> None:
    with LLM(tiny_model("llama")) as llm:
        forward = llm.engine._runner.forward
        broken = iter([False, False, True])

        def sometimes_broken(*args: Any) -> torch.Tensor:
            logits: torch.Tensor = forward(*args)
            if next(broken, False):
                logits = logits.clone()
                logits[0] = torch.nan
            return logits

        llm.engine._runner.forward = sometimes_broken  # type: ignore[method-assign]
        params = SamplingParams(temperature=temperature, max_tokens=5, logprobs=1)
        bad, good = generate(llm, [[1, 2], [3, 4]], params)
        assert (bad.outputs[0].finish_reason, len(bad.outputs[0].token_ids)) == ("error", 2)
        assert "not finite" in bad.error
        assert (good.outputs[0].finish_reason, len(good.outputs[0].token_ids)) == ("length", 5)
        assert llm.kv_stats().num_live_seqs == 0


class TestAfterAnException:
    """A step that raised loses nothing, and a request that was refused leaves nothing."""

    PROMPTS = ([1, 2], [3, 4, 5], [6])

    def run_out(self, engine: LLMEngine, finished: dict[str, Any] | None = None) -> dict[str, Any]:
        finished = {} if finished is None else finished
        for _ in range(100):
            if not engine.has_unfinished_requests():
                return finished
            for output in engine.step():
                if output.is_finished:
                    assert output.request_id not in finished
                    finished[output.request_id] = output
        raise AssertionError("the engine never came to an end")

    @pytest.mark.parametrize("at", [None, 0, 1, 4, 8])
    @pytest.mark.parametrize("where", ["sample", "check_stop"])
    def test_every_request_ends_as_if_nothing_was_raised(
        self, where: str, at: int | None, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, calls = getattr(generation, where), iter(range(1000))

        def sometimes(*args: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(*args)

        answers = []
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=4)
        for is_interrupted in (False, True):
            model = copy.deepcopy(tiny_model("llama"))
            with LLMEngine(model, None, config) as engine, monkeypatch.context() as patch:
                for idx, prompt in enumerate(self.PROMPTS):
                    params = SamplingParams(max_tokens=2 + idx * 3, seed=idx, logprobs=1)
                    engine.add_request(str(idx), list(prompt), params)
                finished: dict[str, Any] = {}
                if is_interrupted and at is not None:
                    patch.setattr(generation, where, sometimes)
                    with pytest.raises(KeyboardInterrupt):
                        self.run_out(engine, finished)
                self.run_out(engine, finished)
                assert engine.kv_stats().num_live_seqs == 0
                completions = {name: out.outputs[0] for name, out in finished.items()}
                answers.append(
                    {
                        name: (done.token_ids, done.finish_reason, len(done.logprobs))
                        for name, done in completions.items()
                    }
                )
        assert len(answers[0]) == len(self.PROMPTS)
        assert answers[0] == answers[1]

    def test_a_request_that_failed_in_a_step_that_raised_is_reported(
        self, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("no forward pass")

        config = EngineConfig(kv_cache_memory_bytes=3 * 2 * PAGE, page_size=PAGE)
        with LLMEngine(copy.deepcopy(tiny_model("llama")), None, config) as engine:
            room = engine.backend.max_seq_tokens()
            engine.add_request("short", [1, 2], SamplingParams(temperature=0.0, max_tokens=2))
            engine.add_request("long", [1] * (room + 1), GREEDY)
            with monkeypatch.context() as patch:
                patch.setattr(engine._runner, "forward", broken)
                with pytest.raises(RuntimeError):
                    engine.step()
            finished = self.run_out(engine)
            assert finished["long"].outputs[0].finish_reason == "error"
            assert finished["short"].outputs[0].finish_reason == "length"

    def test_a_checked_request_takes_nothing(self, tiny_model: Any) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        drawn = []
        for is_checked in (False, True):
            with LLMEngine(model, None, EngineConfig()) as engine:
                if is_checked:
                    engine.check_request([1, 2])
                    for bad in ([], [10**6]):
                        with pytest.raises(ConfigError):
                            engine.check_request(bad)
                        with pytest.raises(ConfigError):
                            engine.add_request("bad", bad)
                    assert not engine.has_unfinished_requests()
                engine.add_request("0", [1, 2], SamplingParams(max_tokens=8))
                drawn.append(self.run_out(engine)["0"].outputs[0].token_ids)
        assert drawn[0] == drawn[1]


class TestOneModuleOneEngine:
    def test_a_module_in_use_is_refused_and_goes_on_working(self, tiny_model: Any) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        before = model.config._attn_implementation
        with LLM(model) as first:
            expected = token_ids(generate(first, [[1, 2, 3]]))
            with pytest.raises(ConfigError, match="another engine"):
                LLM(model)
            assert token_ids(generate(first, [[1, 2, 3]])) == expected
        assert model.config._attn_implementation == before
        with LLM(model) as second:
            assert token_ids(generate(second, [[1, 2, 3]])) == expected

    def test_an_engine_that_is_dropped_gives_the_module_back(self, tiny_model: Any) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        before = model.config._attn_implementation
        llm = LLM(model)
        assert model.config._attn_implementation == ATTENTION_NAME
        del llm
        gc.collect()
        assert model.config._attn_implementation == before

    def test_a_copy_of_a_module_in_use_ends_with_an_attention_of_its_own(
        self, tiny_model: Any
    ) -> None:
        with LLM(copy.deepcopy(tiny_model("llama"))) as llm:
            clone = copy.deepcopy(llm.engine._model)
            with LLM(clone) as other:
                assert token_ids(generate(other, [[1, 2]])) == token_ids(generate(llm, [[1, 2]]))
        clone(torch.tensor([[1, 2]]))  # type: ignore[operator]


def test_a_character_cut_at_the_prompts_end_is_completed_in_the_output() -> None:
    tokenizer = load_tokenizer(resolve_model_name("demo"))
    pieces = tokenizer.encode("a\u20acb")
    whole = [
        start for start in range(1, len(pieces)) if "\ufffd" in tokenizer.decode(pieces[:start])
    ]
    assert whole  # the euro sign is spread over tokens
    for cut in whole:
        streamed = Detokenizer(tokenizer, pieces[:cut])
        for token_id in pieces[cut:]:
            streamed.append(token_id)
        at_once = Detokenizer(tokenizer, pieces[:cut])
        at_once.finish(pieces[cut:])
        assert streamed.text == at_once.text == "\u20acb"


class TestRopeComesBack:
    def model(self, rope_type: str) -> Any:
        rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
        if rope_type == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
            rope |= {"original_max_position_embeddings": 64}
        config_class = hf.Phi3Config if rope_type == "longrope" else hf.LlamaConfig
        config = config_class(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            rope_parameters=rope,
        )
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config).eval()

    @pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
    @pytest.mark.parametrize("is_refused", [False, True])
    @pytest.mark.parametrize("is_inference", [False, True])
    def test_the_frequencies_and_their_updates_are_as_before(
        self, rope_type: str, is_refused: bool, is_inference: bool
    ) -> None:
        model = self.model(rope_type)
        long = torch.arange(150).unsqueeze(0) % 97
        with torch.inference_mode(is_inference):
            expected = model(long, use_cache=False).logits
        rotary = model.model.rotary_emb
        frequencies = rotary.inv_freq.clone()
        if is_refused:
            with pytest.raises(ConfigError):
                LLM(model, kv_cache_memory_bytes=1)
        else:
            with LLM(model, max_model_len=64) as llm:
                assert rotary.rope_type != rope_type
                generate(llm, [[1, 2, 3]])
        assert rotary.rope_type == rope_type
        assert torch.equal(rotary.inv_freq, frequencies)
        with torch.inference_mode(is_inference):
            assert torch.equal(model(long, use_cache=False).logits, expected)


@pytest.mark.parametrize("includes_stop", [False, True])
def test_streamed_text_is_the_final_text_whatever_the_stops(includes_stop: bool) -> None:
    with LLM("demo") as llm:
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
        whole = llm.generate("def ", SamplingParams(**settings), use_tqdm=False)[0].outputs[0].text
        stops = [whole[start : start + size] for start in range(0, 20, 3) for size in (1, 2, 5, 9)]
        params = [
            SamplingParams(
                **settings,
                stop=[stop, "never seen"],
                min_tokens=min_tokens,
                include_stop_str_in_output=includes_stop,
            )
            for stop in stops
            for min_tokens in (0, 5, 24)
        ]
        streamed = [""] * len(params)

        def note(output: Any) -> None:
            streamed[int(output.request_id)] += output.outputs[0].text

        prompts = ["def "] * len(params)
        final = llm.generate(prompts, params, use_tqdm=False)
        output = llm.generate(prompts, params, use_tqdm=False, on_token=note)
        texts = [out.outputs[0].text for out in final]
        assert streamed == [out.outputs[0].text for out in output] == texts
        for text, asked in zip(texts, params, strict=True):
            if asked.min_tokens == 0:
                (stop, _) = asked.stop_strings
                end = whole.index(stop) + (len(stop) if includes_stop else 0)
                assert text == whole[:end]

"""Defects that the engine once had; each test names what a user saw."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import vmalloc.engine.generation as generation
from vmalloc.engine import LLM, EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.model_loader import resolve_model_name
from vmalloc.errors import VmallocError
from vmalloc.prompt_text import TextPrinter, read_prompts

PROMPT = [1, 2, 3, 4]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def demo() -> Any:
    with LLM("demo") as llm:
        yield llm


def _tokens(llm: LLM, prompt: Any = PROMPT, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


def test_two_engines_on_one_module_never_write_something_else(tiny_model: Any) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    first = LLM(model)
    expected = _tokens(first)
    try:
        second = LLM(model)
    except VmallocError:
        first.close()
        return
    first.close()
    try:
        written = _tokens(second)
    except VmallocError:
        written = expected
    second.close()
    assert written == expected
    model(torch.tensor([PROMPT]))  # with no engine left, the module works on its own again


def test_attention_switched_under_a_live_engine_is_an_error(tiny_model: Any) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    with LLM(model) as llm:
        expected = _tokens(llm)
        model.set_attn_implementation("sdpa")
        try:
            written = _tokens(llm)
        except VmallocError:
            return
        assert written == expected


def _longrope_model() -> Any:
    torch.manual_seed(0)
    config = hf.Phi3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64,
        },
    )
    return hf.AutoModelForCausalLM.from_config(config).eval()


def test_a_second_engine_pins_longrope_for_its_own_length() -> None:
    with LLM(_longrope_model()) as llm:
        expected = _tokens(llm)
    model = _longrope_model()
    with LLM(model, max_model_len=50):
        pass
    with LLM(model) as llm:
        assert _tokens(llm) == expected


def test_dynamic_rope_starts_from_its_original_frequencies(tiny_model: Any) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with LLM(copy.deepcopy(model)) as llm:
        expected = _tokens(llm)
    model(torch.zeros(1, 400, dtype=torch.long), use_cache=False)  # its frequencies grow
    with LLM(model) as llm:
        assert _tokens(llm) == expected


def test_a_stop_string_before_min_tokens_does_not_take_streamed_text_back(demo: LLM) -> None:
    streamed: list[str] = []
    params = SamplingParams(temperature=0.0, max_tokens=20, stop="(", min_tokens=8)
    (final,) = demo.generate("def ", params, use_tqdm=False)
    (output,) = demo.generate(
        "def ", params, use_tqdm=False, on_token=lambda out: streamed.append(out.outputs[0].text)
    )
    assert "".join(streamed) == output.outputs[0].text == final.outputs[0].text


@pytest.mark.parametrize("temperature", [1e-46, 1e-300])
def test_a_vanishing_temperature_is_greedy(demo: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=6)
    expected = SamplingParams(temperature=0.0, max_tokens=6)
    assert _tokens(demo, "def ", params) == _tokens(demo, "def ", expected)


def test_a_huge_temperature_draws_no_banned_token(demo: LLM) -> None:
    params: dict[str, Any] = {"seed": 1, "max_tokens": 4, "min_tokens": 4, "stop_token_ids": [5]}
    expected = _tokens(demo, "def ", SamplingParams(temperature=1e38, **params))
    assert _tokens(demo, "def ", SamplingParams(temperature=1e39, **params)) == expected


def test_an_engine_goes_on_after_an_interrupted_step(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with LLMEngine(copy.deepcopy(tiny_model("llama")), None, EngineConfig()) as engine:
        engine.add_request("a", PROMPT, GREEDY)
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(generation, "sample", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        for _ in range(50):
            if not engine.has_unfinished_requests():
                break
            engine.step()
        assert not engine.has_unfinished_requests()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    for path in Path(resolve_model_name("demo")).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "down_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VmallocError, match="down_proj"):
        LLM(str(tmp_path)).close()


def test_a_truncated_checkpoint_is_a_typed_error(tmp_path: Path) -> None:
    for path in Path(resolve_model_name("demo")).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VmallocError):
        LLM(str(tmp_path))


@pytest.mark.parametrize("text", ["a\tb", " :smile: :100:", "a\r\nb", "[red]x[/red]"])
def test_the_printer_changes_no_character(text: str) -> None:
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        printer = TextPrinter([text])
        completion = SimpleNamespace(index=0, text=text, is_finished=True)
        output: Any = SimpleNamespace(request_id="0", outputs=[completion], is_finished=True)
        printer.add(output)
    assert stdout.getvalue() == text + text + "\n\n"


def test_a_prompts_file_splits_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeffa\r\nx\x0cy\n"l\u2028m"\n'.encode())
    assert read_prompts([], path) == ["a", "x\x0cy", "l\u2028m"]


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ("a\ud800", None),
        ({"prompt_token_ids": None}, None),
        ({"prompt_token_ids": 5}, None),
        ({1: 2, "a": 3}, None),
        ("a", {"temperature": 0}),
        (["a"], [None]),
        (["a"], 5),
    ],
)
def test_bad_requests_are_typed_errors(demo: LLM, prompts: Any, params: Any) -> None:
    with pytest.raises(VmallocError):
        demo.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize(
    "params",
    [
        {"stop": 5},
        {"stop": (text for text in ["a"])},  # was used up by the checks, then ignored
        {"stop_token_ids": 5},
        {"stop_token_ids": (token for token in [3])},
        {"temperature": 10**400},
        {"output_kind": "delta"},  # was taken for CUMULATIVE
        {"skip_special_tokens": None},
    ],
)
def test_bad_params_are_typed_errors(params: dict[str, Any]) -> None:
    with pytest.raises(VmallocError):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": 5},
        {"tokenizer": 5},
        {"kv_cache_memory_bytes": 2**80},
        {"max_num_seqs": 2**70},
        {"commit_ahead_tokens": 2**70},
    ],
)
def test_bad_settings_are_typed_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(VmallocError):
        LLM(**{"model": "demo", **settings}).close()


def test_generate_within_a_callback_is_a_typed_error(demo: LLM) -> None:
    def again(_: Any) -> None:
        demo.generate("c", use_tqdm=False)

    with pytest.raises(VmallocError):
        demo.generate(["a", "b"], SamplingParams(max_tokens=4), use_tqdm=False, on_token=again)

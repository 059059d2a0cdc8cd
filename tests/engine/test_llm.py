"""``LLM`` as people use it: a folder with weights and a tokenizer, text in and text out."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vmalloc.engine import LLM, ConfigError, SamplingParams, UnsupportedModelError
from vmalloc.engine.tokenizer import Detokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "def add(a, b): return a + b",
    "naïve café, 東京 is far",
    "emoji 🙂🙃 and 👩‍🚀",
    "import os",
]


def byte_tokenizer(num_tokens: int = 300) -> Any:
    """A byte-level BPE tokenizer; characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Any:
    with LLM(checkpoint, max_num_seqs=8) as llm:
        yield llm


FREE = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


def test_text_in_and_text_out(llm: LLM) -> None:
    outputs = llm.generate(TEXTS, FREE, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    assert [output.prompt for output in outputs] == TEXTS
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3"]
    for output in outputs:
        assert output.prompt_token_ids == tokenizer.encode(output.prompt)
        completion = output.outputs[0]
        assert completion.index == 0
        assert completion.finish_reason == "length"
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        metrics = output.metrics
        assert metrics.first_scheduled_time is not None
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
        assert metrics.first_token_time <= metrics.finished_time


def test_one_prompt_many_prompts_and_token_lists_are_all_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("import os")
    forms: list[Any] = ["import os", ["import os"], {"prompt_token_ids": ids}, ids, [ids], (ids,)]
    written = [llm.generate(form, FREE, use_tqdm=False) for form in forms]
    assert len({outputs[0].outputs[0].text for outputs in written}) == 1
    assert {len(outputs) for outputs in written} == {1}
    assert llm.generate([], FREE, use_tqdm=False) == []


def test_streamed_pieces_add_up_to_the_whole(llm: LLM) -> None:
    pieces: dict[str, list[Any]] = {}
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=60, logprobs=1)
    streamed = llm.generate(
        TEXTS,
        params,
        use_tqdm=False,
        on_token=lambda output: pieces.setdefault(output.request_id, []).append(output.outputs[0]),
    )
    whole = llm.generate(TEXTS, params, use_tqdm=False)
    for idx, (output, expected) in enumerate(zip(streamed, whole, strict=True)):
        completion = output.outputs[0]
        assert completion == expected.outputs[0]
        parts = pieces[str(idx)]
        assert len(parts) > 1
        assert "".join(part.text for part in parts) == completion.text
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        assert token_ids == completion.token_ids
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_streamed_pieces_of_several_completions_add_up(llm: LLM) -> None:
    pieces: dict[tuple[str, int], str] = {}

    def note(output: Any) -> None:
        for completion in output.outputs:
            key = (output.request_id, completion.index)
            pieces[key] = pieces.get(key, "") + completion.text

    params = [
        SamplingParams(n=3, seed=3, max_tokens=30, logprobs=0),
        SamplingParams(n=2, use_beam_search=True, temperature=0.0, max_tokens=12),
        SamplingParams(n=2, best_of=4, seed=5, max_tokens=12),
    ]
    streamed = llm.generate(TEXTS[:3], params, use_tqdm=False, on_token=note)
    whole = llm.generate(TEXTS[:3], params, use_tqdm=False)
    for output, expected in zip(streamed, whole, strict=True):
        assert output.outputs == expected.outputs
        for completion in output.outputs:
            assert completion.text == pieces[output.request_id, completion.index]
    assert len({completion.text for completion in whole[0].outputs}) == 3


def test_priorities_come_one_for_each_prompt(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="1 entries for 2 prompts"):
        llm.generate(["a", "b"], FREE, use_tqdm=False, priority=[1])
    with pytest.raises(ConfigError, match="scheduling_policy"):
        llm.generate(["a", "b"], FREE, use_tqdm=False, priority=[1, 2])
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("keeps_stop", [False, True])
def test_a_stop_string_ends_the_text_and_is_never_shown_before(
    llm: LLM, is_streamed: bool, keeps_stop: bool
) -> None:
    text = llm.generate("def ", FREE, use_tqdm=False)[0].outputs[0].text
    stop = text[9:13]
    at = text.find(stop)
    pieces: list[str] = []
    (output,) = llm.generate(
        "def ",
        SamplingParams(
            temperature=0.0,
            max_tokens=30,
            ignore_eos=True,
            stop=["never there", stop],
            include_stop_str_in_output=keeps_stop,
        ),
        use_tqdm=False,
        on_token=(lambda out: pieces.append(out.outputs[0].text)) if is_streamed else None,
    )
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == text[: at + (len(stop) if keeps_stop else 0)]
    if is_streamed:
        assert "".join(pieces) == completion.text


def test_the_end_token_is_a_token_but_no_text(llm: LLM) -> None:
    end = llm.get_tokenizer().eos_token_id
    for skips in (True, False):
        params = SamplingParams(temperature=0.0, skip_special_tokens=skips, logit_bias={end: 100.0})
        completion = llm.generate("x", params, use_tqdm=False)[0].outputs[0]
        assert completion.token_ids == [end]
        assert (completion.text, completion.finish_reason) == ("", "stop")


def test_logprobs_come_with_their_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    completion = llm.generate("def ", params, use_tqdm=False)[0].outputs[0]
    assert completion.logprobs is not None
    chosen = [
        entries[token_id]
        for entries, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
    assert [entry.rank for entry in chosen] == [1] * len(chosen)
    assert all(entry.decoded_token for entry in chosen)


def test_progress_goes_to_stderr(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(TEXTS, FREE)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err


def test_one_bad_prompt_stops_the_call_before_anything_runs(llm: LLM) -> None:
    before = llm.kv_stats().num_steps
    with pytest.raises(ConfigError, match="prompt is empty"):
        llm.generate(["fine", ""], FREE, use_tqdm=False)
    with pytest.raises(ConfigError, match="2 entries for 1 prompts"):
        llm.generate(["fine"], [FREE, FREE], use_tqdm=False)
    with pytest.raises(ConfigError, match="prompts is a int"):
        llm.generate(7, FREE, use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished_requests()
    assert llm.kv_stats().num_steps == before
    assert len(llm.generate("fine", FREE, use_tqdm=False)) == 1


def test_a_callback_that_raises_leaves_nothing_running(llm: LLM) -> None:
    def fail(output: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, FREE, use_tqdm=False, on_token=fail)
    assert not llm.engine.has_unfinished_requests()
    assert llm.kv_stats().num_live_seqs == 0


def test_token_ids_alone_need_no_tokenizer(checkpoint: str) -> None:
    with LLM(checkpoint, skip_tokenizer_init=True) as llm:
        assert llm.get_tokenizer() is None
        (output,) = llm.generate([[5, 6, 7]], FREE, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 30
        assert output.outputs[0].text == ""


def test_a_bfloat16_checkpoint_computes_in_float32_unless_told(
    checkpoint: str, tmp_path: Path
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for dtype, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        with LLM(str(tmp_path), skip_tokenizer_init=True, dtype=dtype) as llm:  # type: ignore[arg-type]
            assert llm.engine.backend.config.layers[0].dtype == expected


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no/such-model"):
        LLM("no/such-model")
    with pytest.raises(ConfigError, match=tmp_path.name):
        LLM(str(tmp_path))


def test_a_folder_with_an_encoder_decoder_is_refused_before_its_weights(tmp_path: Path) -> None:
    hf.T5Config(vocab_size=97, d_model=32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        LLM(str(tmp_path))


@pytest.mark.parametrize("text", [*TEXTS, "🙂" * 5 + "é", "  leading spaces"])
@pytest.mark.parametrize("num_context", [0, 3])
def test_text_is_the_same_however_tokens_arrive(text: str, num_context: int) -> None:
    tokenizer = byte_tokenizer(262)  # almost one token per byte
    prompt, token_ids = [40] * num_context, tokenizer.encode(text)
    slow = Detokenizer(tokenizer, prompt)
    shown = []
    for token_id in token_ids:
        slow.append(token_id)
        assert "\ufffd" not in slow.text
        assert text.startswith(slow.text)
        shown.append(slow.text)
    slow.finish([])
    fast = Detokenizer(tokenizer, prompt)
    fast.finish(token_ids)
    assert slow.text == fast.text == text
    assert len(set(shown)) > 3


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_tokenizer(257)
    token_ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    for token_id in token_ids:
        detokenizer.append(token_id)
    assert detokenizer.text == "a"
    detokenizer.finish([])
    assert detokenizer.text == "a\ufffd"


def test_the_bare_package_cannot_be_imported() -> None:
    code = "import engine"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError: import vmalloc.engine instead" in done.stderr


def test_the_engine_sees_only_the_librarys_public_modules() -> None:
    allowed = {
        "",
        "backend",
        "config",
        "errors",
        "factory",
        "host_memory",
        "memory_table",
        "page_map",
        "plans",
    }
    kernels = ("buckets", "cpu", "decoder_cpu", "decoder_spec", "draw_cpu", "select")
    allowed |= {f"kernels.{name}" for name in kernels}
    allowed |= {f"measuring.{name}" for name in ("figures", "lengths", "provenance")}
    for path in sorted((ROOT / "engine").rglob("*.py")):
        levels = len(path.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == levels:
                assert (node.module or "") in allowed, f"{path.name}: {node.module}"
                assert "_core" not in {alias.name for alias in node.names}, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("vmalloc"), path.name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("vmalloc") for alias in node.names)


@pytest.mark.parametrize("count", [1, 2])
def test_attention_uses_as_many_threads_as_torch(tiny_model: Any, count: int) -> None:
    from vmalloc import _core

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with LLM(copy.deepcopy(tiny_model("llama"))):
            assert _core.num_threads() == count
    finally:
        torch.set_num_threads(before)

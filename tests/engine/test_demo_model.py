"""The bundled demo model is what its card says: small, loadable, lossless, better than counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "engine" / "demo_model"
CONTEXT = 2048

SNIPPET = '''\
"""Keep named counters in memory and write them to a file."""

import json
import os


class Counters:
    """A set of counters, each known by its name."""

    def __init__(self, path=None):
        self.path = path
        self.values = {}

    def add(self, name, amount=1):
        """Add an amount to a counter and return its new value."""
        if not isinstance(name, str):
            raise TypeError("name must be a string, not %r" % type(name))
        value = self.values.get(name, 0) + amount
        self.values[name] = value
        return value

    def save(self):
        if self.path is None:
            raise ValueError("no path was given")
        with open(self.path, "w") as file:
            json.dump(self.values, file)

    def load(self):
        if not os.path.exists(self.path):
            return
        with open(self.path) as file:
            for name, value in json.load(file).items():
                self.values[name] = value


def main(args=None):
    counters = Counters()
    for name in args:
        counters.add(name)
    for name, value in sorted(counters.values.items()):
        print(name, value)


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_weights_are_small_float32_and_stored_once() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 6_300_000
    total = 0
    with safe_open(path, framework="pt") as weights:
        names = set(weights.keys())
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float32, name
            assert torch.isfinite(tensor).all(), name
            total += tensor.numel()
    assert total <= 1_500_000
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_model_loads_with_the_promised_shape(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert config.head_dim == 64
    assert config.num_attention_heads == 4
    assert config.num_key_value_heads == 2
    assert config.max_position_embeddings == CONTEXT
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert heads * config.head_dim * 2 * 4 == 4096


def test_generation_config_and_tokenizer_agree(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer, name)
        assert expected is not None
        assert getattr(model.config, name) == expected
        assert getattr(model.generation_config, name) == expected
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        "if a:\n\tif b:\n\t\tpass\n",
        "one\r\ntwo\rthree\n\n\n   four  ",
        " leading,  double and trailing ",
        "naïve Ünïcode 漢字 العربية हिन्दी 👩\u200d🚀 e\u0301",
        "\u00a0\u2028\u3000\x00\x07\ufeff\ufffd",
        "\n",
        " ",
        "",
        "____init____ 0x1F 12345678901234567890 1e-9 !== <<>> '''\"\"\"",
        "ordinary text with <|nothing|> special",
    ],
)
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    bare = tokenizer(text, add_special_tokens=False).input_ids
    assert bare == ids[1:]
    assert tokenizer.decode(bare) == text


def test_indentation_is_one_token(tokenizer: Any) -> None:
    for width in (4, 8, 12, 16):
        ids = tokenizer("\n" + " " * width + "return", add_special_tokens=False).input_ids
        assert len(ids) == 3


def test_chat_template_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Complete: def f(x):"},
        {"role": "assistant", "content": "def f(x):\n    return x"},
        {"role": "user", "content": "Again"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|bos|><|system|>Be brief.<|user|>Complete: def f(x):"
        "<|assistant|>def f(x):\n    return x<|eos|><|user|>Again"
    )
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == rendered + "<|assistant|>"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    for token in ("<|bos|>", "<|system|>", "<|assistant|>"):
        assert tokenizer.convert_tokens_to_ids(token) in ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_model_predicts_python_far_better_than_counting(model: Any, tokenizer: Any) -> None:
    # Counted over the training text, unigrams give 5.56 nats per token here and bigrams 3.18; the
    # model gives 1.62 and an untrained one ln 2048 = 7.62.
    ids = tokenizer(SNIPPET, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 2.2


def test_last_position_of_the_context_works(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(SNIPPET * 8, return_tensors="pt").input_ids[:, :CONTEXT]
    assert ids.shape[1] == CONTEXT
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    assert torch.isfinite(logits[CONTEXT - 1]).all()
    late = torch.nn.functional.cross_entropy(logits[-513:-1], ids[0, -512:])
    assert float(late) < 2.2


def test_greedy_continuation_looks_like_python(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("class Foo:\n    def __init__(self", return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "):\n" in text
    assert "\n        " in text


def test_the_card_tells_where_the_model_comes_from() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for fact in ("PSF-2.0", "scripts/train_demo_model.py", "bits per byte", "SHA-256", "bigram"):
        assert fact in card
    for path in FOLDER.glob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))

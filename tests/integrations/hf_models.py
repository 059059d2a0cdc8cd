"""Tiny models to generate with, and what is compared about a run.

Owns: the models made so far.  Thread-safety: none.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.engine.conftest import CONFIGS as ENGINE_CONFIGS
from tests.engine.conftest import _model as engine_model

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 3], [1, 2, 3], [4] * 20)
ENGINE_MODELS = tuple(ENGINE_CONFIGS)
VERSION = tuple(map(int, hf.__version__.split(".")[:2]))
# Up to 5.17 a sliding window hands more tokens to assisted decoding than its mask has.
WINDOWS_ASSIST = VERSION >= (5, 18)

hf.logging.set_verbosity_error()  # right padding is what some tests are about


@cache
def _architectures() -> dict[str, Any]:
    """The tiny configs behind docs/supported-models.md, refused ones included, by key."""
    path = ROOT / "scripts" / "list_supported_models.py"
    spec = importlib.util.spec_from_file_location("list_supported_models", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return {item.key: (script, item) for item in script.ARCHITECTURES}


@cache
def model(name: str) -> Any:
    """``model("llama")`` of the engine's tests, ``model("+jamba")`` of the supported list."""
    if not name.startswith("+"):
        return engine_model(name)
    script, architecture = _architectures()[name[1:]]
    made = script.build_model(architecture).eval()
    made.generation_config.eos_token_id = None
    return made


def padded(side: str = "left", prompts: Any = PROMPTS) -> dict[str, torch.Tensor]:
    """A ragged batch, filled up with token 0 on one side."""
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        fill, ones = [0] * (longest - len(prompt)), [1] * len(prompt)
        ids.append(fill + prompt if side == "left" else prompt + fill)
        mask.append(fill + ones if side == "left" else ones + fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def one(prompt: Any = (1, 2, 3, 1, 2, 3, 1, 2, 3, 5, 1, 2)) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(prompt)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(made: Any, inputs: Any, **settings: Any) -> Any:
    """``generate()`` with a seed, its whole output."""
    torch.manual_seed(3)
    defaults = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    return made.generate(**inputs, **{**defaults, **settings})


def assert_same_run(ours: Any, theirs: Any) -> None:
    """Tokens are equal; scores, which are after filtering, agree within 1e-4."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def num_page_mappings() -> int:
    """Kernel mappings of our pages in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:vmalloc")

"""The demo model made slow: it writes the same text, through layers that add nothing.

A stream of the demo model is over before a browser has looked twice.
Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vmalloc.engine.model_loader import resolve_model_name

NUM_LAYERS = 48
"""Instead of 4. More also means that much more KV a token."""


def save_slow_demo(folder: Path) -> str:
    """Write the checkpoint; returns its path.

    Layers are repeated, and the products that write to the residual stream are zero in the copies.
    """
    source = Path(resolve_model_name("demo"))
    for path in source.iterdir():
        shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    num_layers = config["num_hidden_layers"]
    for layer_idx in range(num_layers, NUM_LAYERS):
        for name, weight in list(weights.items()):
            if ".layers.0." in name:
                is_written = name.endswith(("o_proj.weight", "down_proj.weight"))
                copy = torch.zeros_like(weight) if is_written else weight.clone()
                weights[name.replace(".layers.0.", f".layers.{layer_idx}.")] = copy
    config["num_hidden_layers"] = NUM_LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)

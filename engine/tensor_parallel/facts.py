"""What all ranks of an engine must have in common.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
import transformers

from ..assembly import EngineParts
from .agreement import Fact, agree
from .rank_channel import RankChannel

LOAD_TIMEOUT_S = 7_200.0
"""Longest wait for another rank's weights: a disk may serve one rank after the other."""


def version_facts() -> dict[str, Fact]:
    """What runs here."""
    return {
        "vmalloc": version("vmalloc"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def weight_facts(model: torch.nn.Module) -> dict[str, Fact]:
    """What was loaded: ranks that compute together must have it of one type."""
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    return {"model": type(model).__name__, "dtype": ", ".join(sorted(dtypes))}


def meet_loaded(channel: RankChannel, model: torch.nn.Module) -> None:
    """Wait until every rank has loaded its share, and see that they go together.

    Raises ``RankMismatchError`` in all ranks if not.
    """
    channel.meet(LOAD_TIMEOUT_S)
    agree(channel, weight_facts(model))


def settings_facts(parts: EngineParts) -> dict[str, Fact]:
    """What an engine came to: its model's type, its layers and the memory they have."""
    cache, config = parts.backend, parts.config
    return {
        "device": torch.device(config.device).type,
        "KV backend": cache.name,
        "KV layers": str(cache.config.layers),
        "KV page in bytes": cache.stats().page_bytes,
        "KV memory in bytes": cache.config.capacity_bytes,
        "swap space in bytes": cache.config.swap_bytes,
        "longest sequence in tokens": cache.config.max_seq_len,
        "most sequences": cache.config.max_num_seqs,
        "forward pass": parts.runner.forward_name,
    }

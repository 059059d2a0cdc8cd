"""From names to an engine that runs: weights, tokenizer, cache.

Owns: nothing.  Thread-safety: none; the thread that loads is the one that steps.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import ConfigError
from .config import EngineConfig
from .devices import choose_device
from .llm_engine import LLMEngine
from .model_loader import check_module, load_model, resolve_model_name
from .startup import StartupPhases
from .tokenizer import load_tokenizer


def load_engine(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    config: EngineConfig | None = None,
    *,
    skip_tokenizer_init: bool = False,
    phases: StartupPhases | None = None,
) -> LLMEngine:
    """Load what is named and make an engine of it.

    Args:
        model: ``"demo"``, a local folder, a hub id, or a transformers module.
        tokenizer: folder, hub id or tokenizer object. None: the model's own; a module that is
            passed ready built has none.
        skip_tokenizer_init: work with token ids only.
        phases: times what takes long.

    Raises ``ConfigError`` and ``UnsupportedModelError``.
    """
    config = config or EngineConfig()
    phases = phases or StartupPhases()
    if isinstance(model, str | os.PathLike):
        name = resolve_model_name(os.fspath(model))
        module = None  # several ranks load their shares of it below
        if config.tensor_parallel_size == 1:
            with phases.phase("load weights"):
                module = load_model(name, config.dtype, choose_device(config.device))
        tokenizer = name if tokenizer is None else tokenizer
    else:
        if config.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {config.tensor_parallel_size} and model a "
                f"{type(model).__name__}; it must be a folder or hub id, of which every rank "
                "loads its share"
            )
        check_module(model, config.dtype, config.device)
        module = model.eval()
    if skip_tokenizer_init:
        tokenizer = None
    elif isinstance(tokenizer, str | os.PathLike):
        with phases.phase("load tokenizer"):
            tokenizer = load_tokenizer(resolve_model_name(os.fspath(tokenizer)))
    elif tokenizer is not None and not hasattr(tokenizer, "encode"):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}; it must be a name or a tokenizer"
        )
    if module is None:
        from .tensor_parallel.loading import load_parallel_engine

        return load_parallel_engine(name, tokenizer, config, phases)
    return LLMEngine(module, tokenizer, config, phases=phases)

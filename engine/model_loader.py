"""Finds and loads a decoder, and tells what the engine must know of it.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ConfigError, VmallocError
from .devices import check_dtype, module_device
from .errors import UnsupportedModelError

DEMO_MODEL = "demo"
"""Names the checkpoint that is bundled with the engine."""

DEFAULT_CONTEXT_TOKENS = 2048
"""Context of models whose config does not tell."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_model_name(name: str) -> str:
    """The folder behind ``"demo"``; any other local path or hub id as it is."""
    return str(Path(__file__).resolve().parent / "demo_model") if name == DEMO_MODEL else name


def load_model(name: str, dtype: str, device: torch.device) -> torch.nn.Module:
    """Load weights of a local folder or hub id onto ``device``, local files first.

    ``"auto"`` is float32 on CPU; on a GPU it is the checkpoint's type if that has 16 bits, else
    bfloat16. Raises ``ConfigError`` if nothing is there, or it does not fit the device, and
    ``UnsupportedModelError`` if it is no decoder.
    """
    config, is_local, torch_dtype = read_config(name, dtype, device)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch_dtype,
            local_files_only=is_local,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise loading_error(name, config, error) from error
    check_weights(name, loading)
    module: torch.nn.Module = model
    try:
        return module.eval().to(device)
    except torch.OutOfMemoryError as error:
        num_bytes = sum(parameter.nbytes for parameter in module.parameters())
        raise ConfigError(
            f"model is {name!r}; its {num_bytes} bytes of weights do not fit {device}: {error}"
        ) from error


def outline_model(name: str, dtype: str, device: torch.device) -> torch.nn.Module:
    """The model that ``load_model`` would load for ``device``, without its weights.

    Its tensors are on torch's ``"meta"`` device: they have shapes and no memory, so this takes
    milliseconds for any size. Raises as ``load_model`` does, but for what only weights can tell.
    """
    config, _, torch_dtype = read_config(name, dtype, device)
    try:
        with torch.device("meta"):
            module: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    except Exception as error:
        raise loading_error(name, config, error) from error
    return module.eval()


def read_config(name: str, dtype: str, device: torch.device) -> tuple[Any, bool, torch.dtype]:
    """A model's config, whether it came from local files, and the type to compute in.

    Raises ``ConfigError`` and ``UnsupportedModelError`` as ``load_model`` does.
    """
    config, is_local = _load_config(name)
    torch_dtype = _DTYPES.get(dtype) or automatic_dtype(config, device)
    check_dtype(torch_dtype, device)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            name, "architecture", f"{type(config).__name__} is an encoder-decoder"
        )
    return config, is_local, torch_dtype


def loading_error(name: str, config: Any, error: Exception) -> VmallocError:
    """What to raise for whatever transformers raised over a model."""
    if "Unrecognized configuration class" in str(error):
        reason = f"{type(config).__name__} has no causal language model in transformers"
        return UnsupportedModelError(name, "architecture", reason)
    return ConfigError(f"model is {name!r}; it cannot be loaded: {error}")


def automatic_dtype(config: Any, device: torch.device) -> torch.dtype:
    """What ``dtype="auto"`` stands for: speed where there are 16-bit units, exactness elsewhere."""
    if device.type == "cpu":
        return torch.float32
    for source in (config, config.get_text_config(decoder=True)):
        stored = getattr(source, "dtype", None)
        stored = _DTYPES.get(stored, stored) if isinstance(stored, str) else stored
        if stored in (torch.bfloat16, torch.float16):
            return stored
    return torch.bfloat16


def check_weights(name: str, loading: Any) -> None:
    """Refuse a checkpoint whose gaps transformers has filled with random numbers."""
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(map(str, loading.get(what) or ()))
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ConfigError(
                f"model is {name!r}; its checkpoint has {what.replace('_', ' ')}: "
                f"{', '.join(keys[:3])}{more}"
            )


def _load_config(name: str) -> tuple[Any, bool]:
    """The model's config, and whether it came from local files."""
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), True
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise ConfigError(f"model is {name!r}; that folder has no model: {error}") from error
    try:
        return AutoConfig.from_pretrained(name), False
    except Exception as error:
        raise ConfigError(
            f"model is {name!r}; it is neither a local folder with a model nor a hub id that can "
            f"be reached: {error}"
        ) from error


def check_module(model: Any, dtype: str, device: str) -> None:
    """Raise ``ConfigError`` unless a ready-built module can run, on ``device`` and in ``dtype``."""
    is_module = isinstance(model, torch.nn.Module)
    parameter = next(model.parameters(), None) if is_module else None
    if parameter is None or not hasattr(model, "config"):
        raise ConfigError(
            f"model is a {type(model).__name__}; it must be a transformers model with weights"
        )
    place = module_device(model, device)
    check_dtype(parameter.dtype, place)
    if dtype != "auto" and parameter.dtype != _DTYPES[dtype]:
        raise ConfigError(
            f"dtype is {dtype!r} and the module that was passed holds {parameter.dtype}; convert "
            "it, or leave dtype='auto'"
        )


def text_config(model: torch.nn.Module) -> Any:
    """Config of the language model, inside a composite config or not."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def context_tokens(model: torch.nn.Module) -> int:
    """Most tokens of one sequence that the model was made for."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return int(limit) if limit else DEFAULT_CONTEXT_TOKENS


def vocab_size(model: torch.nn.Module) -> int:
    """Rows of the input embedding: token ids must be below."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def end_token_ids(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, from the generation config, else the config, else the tokenizer."""
    for source in (getattr(model, "generation_config", None), text_config(model), tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            return frozenset(value if isinstance(value, list | tuple) else [value])
    return frozenset()

"""Reads weights out of single modules, and refuses whatever is more than the weights.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.decoder_spec import Activation, Norm, Projection
from .errors import NotRecognisedError
from .families import Family


def check_untouched(module: nn.Module, name: str) -> None:
    """Refuse a module that computes more than its class was written to, or in training mode."""
    check_instance(module, name)
    kind = type(module)
    if not is_of_libraries(kind.forward):
        raise NotRecognisedError(f"{name} is a {kind.__name__}, whose forward was replaced")


def is_of_libraries(function: Any) -> bool:
    """Whether a function, and what it wraps, are of torch and transformers: nobody patched it."""
    if function is None:
        return False
    while function is not None:
        home = getattr(function, "__globals__", {}).get("__name__", "")
        if home.partition(".")[0] not in ("torch", "transformers"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def check_instance(module: nn.Module, name: str) -> None:
    """Refuse a module that computes more than its class does, or in training mode."""
    own = vars(module)
    if "forward" in own or "_hf_hook" in own:
        raise NotRecognisedError(f"{name} has a forward of its own")
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            # These only note outputs, and only where someone asks for them.
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                raise NotRecognisedError(f"{name} has a hook")
    if module.training:
        raise NotRecognisedError(f"{name} is in training mode")


def check_dropout(module: Any, name: str) -> None:
    """Refuse what stands in a dropout's place; one in eval mode passes its input on."""
    if type(module) is not nn.Dropout:
        raise NotRecognisedError(f"{name} is a {type(module).__name__}, not a Dropout")
    check_untouched(module, name)


def check_no_global_hooks() -> None:
    """Refuse while hooks on every module are registered."""
    shared: Any = torch.nn.modules.module
    if shared._global_forward_hooks or shared._global_forward_pre_hooks:
        raise NotRecognisedError("torch has global forward hooks")


def take_tensor(module: nn.Module, attribute: str, name: str) -> Tensor:
    """A weight as plain memory: float32 on the CPU, rows contiguous, of no tensor subclass."""
    tensor = getattr(module, attribute, None)
    name = f"{name}.{attribute}"
    if type(tensor) not in (Tensor, nn.Parameter):
        raise NotRecognisedError(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    assert isinstance(tensor, Tensor)
    if tensor.dtype != torch.float32:
        raise NotRecognisedError(f"{name} is {tensor.dtype}, not torch.float32")
    if not tensor.is_cpu:
        raise NotRecognisedError(f"{name} is on {tensor.device}, not on cpu")
    if tensor.layout != torch.strided or tensor.stride(-1) != 1 or tensor.is_neg():
        raise NotRecognisedError(f"{name} does not lie in rows")
    return tensor.detach()


def take_projection(
    module: Any, name: str, in_features: int, out_features: int | None = None
) -> Projection:
    """A Linear's weight and bias; ``out_features`` None takes any number."""
    if type(module) is not nn.Linear:
        raise NotRecognisedError(f"{name} is a {type(module).__name__}, not a Linear")
    check_untouched(module, name)
    weight = take_tensor(module, "weight", name)
    rows = weight.shape[0] if out_features is None else out_features
    _check_shape(weight, (rows, in_features), name)
    bias = None if module.bias is None else take_tensor(module, "bias", name)
    if bias is not None:
        _check_shape(bias, (rows,), f"{name}.bias")
    return Projection(weight, bias)


def split_projection(projection: Projection, sizes: tuple[int, ...]) -> tuple[Projection, ...]:
    """Consecutive rows of one projection as projections; they share its memory."""
    ends = list(accumulate(sizes))
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    weight, bias = projection.weight, projection.bias
    return tuple(Projection(weight[span], None if bias is None else bias[span]) for span in spans)


def take_norm(module: Any, name: str, size: int, family: Family) -> Norm:
    """An RMS norm's weight and constants."""
    if not family.is_class(module, "RMSNorm"):
        raise NotRecognisedError(
            f"{name} is a {type(module).__name__}, not a {family.prefix}RMSNorm"
        )
    check_untouched(module, name)
    weight = take_tensor(module, "weight", name)
    _check_shape(weight, (size,), name)
    eps = getattr(module, "variance_epsilon", None)
    return Norm(weight, float(module.eps if eps is None else eps), family.norm_offset)


def take_activation(module: Any, name: str) -> Activation:
    """Which activation a module is: seen by what it answers, since many classes do the same."""
    check_instance(module, name)
    grid = torch.linspace(-6.0, 6.0, 97, dtype=torch.float32, device="cpu")
    known: tuple[tuple[Activation, Tensor], ...] = (
        ("silu", F.silu(grid)),
        ("gelu_tanh", F.gelu(grid, approximate="tanh")),
    )
    try:
        answer = module(grid)
    except Exception as error:  # it is anybody's, e.g. one that wants another shape
        raise NotRecognisedError(
            f"{name} is a {type(module).__name__}, which raised {type(error).__name__}: {error}"
        ) from error
    for activation, expected in known:
        if isinstance(answer, Tensor) and torch.equal(answer, expected):
            return activation
    raise NotRecognisedError(f"{name} is a {type(module).__name__}, neither SiLU nor tanh GELU")


def take_children(
    module: nn.Module, name: str, *layouts: frozenset[str], ignored: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Which of some sets of names a module's children have; nothing may be missing or left over."""
    names = frozenset(dict(module.named_children())) - ignored
    if names not in layouts:
        raise NotRecognisedError(
            f"{name} is made of {', '.join(sorted(names))}, which is no known graph"
        )
    check_untouched(module, name)
    return names


def _check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise NotRecognisedError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")

"""How much of a GPU's memory is left for KV once everything else has what it needs.

Owns: nothing.  Thread-safety: ``kv_capacity`` is pure; measuring needs the device to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .kv_attention import AttentionCall, attention_through
from .packed_forward import has_logits_to_keep
from .sampler import sample
from .sampling_params import SamplingParams
from .sequence import Sequence

GRAPH_BYTES = 16 << 20
"""Set aside for each CUDA graph captured at start: a few hundred kernel nodes, and workspaces."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a GPU's memory holds besides KV, in bytes.

    Attributes:
        total_bytes: all of it.
        other_bytes: taken already and not by torch: other processes, the CUDA context, libraries.
        weight_bytes: the model, and whatever else torch holds.
        activation_bytes: most that a step takes on top.
        graph_bytes: set aside for CUDA graphs.
    """

    total_bytes: int
    other_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int


def kv_capacity(use: MemoryUse, utilization: float) -> int:
    """Bytes of KV that keep everything together below ``utilization`` of the device's memory.

    Raises ``ConfigError`` naming every part if nothing is left.
    """
    allowed = int(use.total_bytes * utilization)
    taken = use.other_bytes + use.weight_bytes + use.activation_bytes + use.graph_bytes
    if allowed <= taken:
        raise ConfigError(
            f"gpu_memory_utilization is {utilization}; that is {allowed} of {use.total_bytes} bytes"
            f", and {taken} are needed besides KV: {use.weight_bytes} for weights, "
            f"{use.activation_bytes} for activations, {use.graph_bytes} for CUDA graphs, "
            f"{use.other_bytes} taken by others"
        )
    return allowed - taken


def measure_use(run_step: Callable[[], None], device: torch.device, graph_bytes: int) -> MemoryUse:
    """Run the largest step once and see what it takes. Not yet run on a GPU."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    weight_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_step()
    torch.cuda.synchronize(device)
    activation_bytes = torch.cuda.max_memory_allocated(device) - weight_bytes
    torch.cuda.empty_cache()  # the KV cache takes its pages from the driver, not from torch
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    other_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    return MemoryUse(total_bytes, max(0, other_bytes), weight_bytes, activation_bytes, graph_bytes)


@torch.inference_mode()
def run_largest_step(
    model: torch.nn.Module, *, num_tokens: int, num_seqs: int, max_model_len: int
) -> None:
    """A forward pass of ``num_tokens`` rows without a KV cache, and a draw for ``num_seqs``.

    Raises ``ConfigError`` if the device has no memory for it.
    """
    try:
        logits = largest_logits(
            model, num_tokens=num_tokens, num_seqs=num_seqs, max_model_len=max_model_len
        )
        draw(logits)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"max_num_batched_tokens is {num_tokens}; a step of so many does not fit "
            f"{next(model.parameters()).device} beside the weights: {error}"
        ) from error


def largest_logits(
    model: torch.nn.Module, *, num_tokens: int, num_seqs: int, max_model_len: int
) -> Tensor:
    """Float32 logits ``[num_seqs, vocab_size]`` of a forward pass of ``num_tokens`` rows.

    Attention, which is switched to ours, answers with zeros.
    """
    any_model: Any = model
    device = next(model.parameters()).device
    rows = torch.arange(min(num_tokens, num_seqs), device=device)
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device=device),
        "position_ids": torch.arange(num_tokens, device=device).remainder(max_model_len)[None],
        "use_cache": False,
    }
    if has_logits_to_keep(model):
        arguments["logits_to_keep"] = rows

    def attend(call: AttentionCall) -> Tensor:
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[2])

    with attention_through(attend):
        logits: Tensor = any_model(**arguments).logits
    return logits[0, : len(rows)].float()


def draw(logits: Tensor) -> None:
    """The sampling that takes most memory: float64 sums over sorted probabilities."""
    params = SamplingParams(temperature=1.0, top_k=max(1, logits.shape[1] // 2), top_p=0.9)
    seqs = [Sequence(idx, "", [0], params, max_tokens=1) for idx in range(len(logits))]
    sample(seqs, logits)

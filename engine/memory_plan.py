"""What an engine would take and hold, worked out without loading weights or making one.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import choose_backend, create_kv_backend
from ..backend import KVBackend
from ..config import KVCacheConfig, LayerKVSpec
from ..factory import BackendChoice, page_bytes_of
from ..host_memory import available_bytes
from ..kernels.select import select_kernels
from .assembly import graph_bytes
from .cache_factory import CacheFactory
from .cache_setup import cache_config, resolve_config, resolve_max_model_len
from .config import EngineConfig
from .device_memory import MemoryUse, kv_capacity
from .devices import choose_device
from .model_loader import outline_model, resolve_model_name
from .probe import observe_outline
from .tensor_parallel.rank_outline import outline_rank
from .workspace import estimate_workspace, has_experts, without_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The figures of one engine before it exists; sizes in bytes.

    With several ranks sizes are those of each; ``num_tokens`` and what counts sequences and pages
    is of all, for every rank has the same ones.

    Attributes:
        num_ranks: processes that share the model's heads.
        model, device, dtype: what would run, where, and in which element type.
        kv_backend, kv_driver, kv_reason: which KV cache ``auto`` stands for, and why.
        layers: what each decoder layer stores for a token.
        layers_per_group: layers that share a row.
        token_bytes: K and V of one token over all layers.
        weight_bytes: the model's parameters.
        workspace_bytes: an estimate of what the largest step takes besides.
        available_bytes: memory of the device that could be taken now.
        cap_bytes: hard cap on physical KV memory, in whole pages.
        cap_reason: where the cap comes from, in words.
        is_cap_exact: whether the engine's cap will be this one; else it is measured at start.
        swap_space_bytes: host memory for preempted requests.
        reserved_bytes: address space; it costs no memory.
        page_bytes, num_pages: one physical page (paged backend: a block), and those of the cap.
        num_slots: address ranges of one sequence each; None for the paged backend.
        max_model_len, max_num_seqs, max_num_batched_tokens: the limits of sequences and steps.
        seq_bytes: pages of one sequence of full length.
        max_full_length_seqs: sequences of full length that fit at once, at most ``max_num_seqs``.
        max_seq_tokens: most tokens that one sequence alone could have.
        num_tokens: tokens that would fill the cap if no page were partly used.
        notes: what to know, and what cannot be known before the engine starts.
    """

    num_ranks: int
    model: str
    device: str
    dtype: str
    kv_backend: str
    kv_driver: str
    kv_reason: str
    layers: tuple[LayerKVSpec, ...]
    layers_per_group: int
    token_bytes: int
    weight_bytes: int
    workspace_bytes: int
    available_bytes: int
    cap_bytes: int
    cap_reason: str
    is_cap_exact: bool
    swap_space_bytes: int
    reserved_bytes: int
    page_bytes: int
    num_pages: int
    num_slots: int | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seq_bytes: int
    max_full_length_seqs: int
    max_seq_tokens: int
    num_tokens: int
    notes: tuple[str, ...]


def plan_memory(model: str | os.PathLike[str], config: EngineConfig | None = None) -> MemoryPlan:
    """Plan the memory of an engine over ``model``: ``"demo"``, a local folder or a hub id.

    Reads the model's config, not its weights. On the CPU the KV cache is made, empty, and closed
    again: that reserves addresses and takes no memory. Raises ``ConfigError`` and
    ``UnsupportedModelError`` where the engine would, but for what only weights can tell.
    """
    config = config or EngineConfig()
    name = resolve_model_name(os.fspath(model))
    device = choose_device(config.device)
    outline = outline_model(name, config.dtype, device)
    max_model_len = resolve_max_model_len(outline, config)
    caches = CacheFactory(device, config.kv_backend, config.kv_driver)
    choice = choose_backend(config.kv_backend, str(device), config.kv_driver)
    with without_experts(outline):
        layers, num_heads = observe_outline(outline)
    num_ranks = config.tensor_parallel_size
    rank = outline_rank(name, outline, layers, num_heads, num_ranks, device)
    layers, num_heads, weights = rank.layers, rank.num_heads, rank.weight_bytes
    workspace = estimate_workspace(
        outline,
        num_tokens=config.step_tokens,
        num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )
    limit = _device_limit(config, device, weights, workspace)
    resolved = resolve_config(config, layers, max_model_len, device, limit)
    cap_reason, is_cap_exact = _explain_cap(config, resolved, layers, max_model_len, device)
    with _make_cache(cache_config(resolved, layers), num_heads, caches, choice) as backend:
        figures = _cache_figures(backend, choice, device)
        return MemoryPlan(
            num_ranks=num_ranks,
            model=os.fspath(model),
            device=str(device),
            dtype=str(next(outline.parameters()).dtype).removeprefix("torch."),
            kv_backend=choice.kind,
            kv_driver=choice.driver,
            kv_reason=choice.reason,
            layers=layers,
            layers_per_group=resolved.layers_per_group or len(layers),
            weight_bytes=weights,
            workspace_bytes=workspace,
            available_bytes=_available(device),
            cap_reason=cap_reason,
            is_cap_exact=is_cap_exact,
            swap_space_bytes=resolved.swap_space_bytes or 0,
            max_model_len=max_model_len,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.step_tokens,
            notes=(
                *_notes(outline, device, choice, is_cap_exact, figures),
                *_rank_notes(num_ranks, device),
            ),
            **figures,
        )


def _cache_figures(
    backend: KVBackend, choice: BackendChoice, device: torch.device
) -> dict[str, Any]:
    """What an empty cache says of itself."""
    stats, config = backend.stats(), backend.config
    seq_bytes = backend.bytes_for(config.max_seq_len)
    is_paged = choice.kind == "paged"
    # On CUDA a paged cache has blocks for the cap alone, where its twin has some for every slot.
    is_all_taken = is_paged and device.type == "cuda"
    return {
        "token_bytes": config.token_bytes,
        "cap_bytes": stats.capacity_bytes,
        "reserved_bytes": stats.capacity_bytes if is_all_taken else stats.reserved_bytes,
        "page_bytes": stats.page_bytes,
        "num_pages": stats.capacity_bytes // stats.page_bytes,
        "num_slots": None if is_paged else config.num_slots or 2 * config.max_num_seqs,
        "seq_bytes": seq_bytes,
        "max_full_length_seqs": min(config.max_num_seqs, stats.capacity_bytes // seq_bytes),
        "max_seq_tokens": backend.max_seq_tokens(),
        "num_tokens": stats.capacity_bytes // config.token_bytes,
    }


def _make_cache(
    config: KVCacheConfig, num_heads: int, caches: CacheFactory, choice: BackendChoice
) -> KVBackend:
    """The empty cache itself on the CPU; for a GPU its twin that only counts."""
    if caches.device.type == "cpu":
        return caches.make(config, num_heads)[0]
    real = replace(config, device=str(caches.device), driver=caches.driver)
    kernels = select_kernels(
        config.layers,
        device=caches.device,
        has_block_table=choice.kind == "paged",
        num_heads=num_heads,
    )
    page_bytes = None if choice.kind == "paged" else page_bytes_of(real)
    return counting_twin(
        replace(config, page_bytes=page_bytes, lookahead_tokens=kernels.lookahead_rows), choice.kind
    )


def counting_twin(config: KVCacheConfig, kind: str) -> KVBackend:
    """The same cache over the null driver: it counts pages and takes neither them nor addresses."""
    return create_kv_backend(replace(config, device="cpu", driver="null"), kind)


def _available(device: torch.device) -> int:
    return available_bytes() if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def _device_limit(
    config: EngineConfig, device: torch.device, weights: int, workspace: int
) -> int | None:
    """As ``assembly`` does, with estimates for what it measures. Not yet run on a GPU."""
    if device.type == "cpu" or config.kv_cache_memory_bytes is not None:
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    use = MemoryUse(total_bytes, total_bytes - free_bytes, weights, workspace, graph_bytes(config))
    return kv_capacity(use, config.gpu_memory_utilization)


def _explain_cap(
    config: EngineConfig,
    resolved: EngineConfig,
    layers: tuple[LayerKVSpec, ...],
    max_model_len: int,
    device: torch.device,
) -> tuple[str, bool]:
    """Where the cap comes from, and whether it is certain."""
    if config.kv_cache_memory_bytes is not None:
        return "asked for", True
    # With no limit of the device, what is left is what the sequences can use.
    unlimited = resolve_config(config, layers, max_model_len, device, 2**63 - 1)
    if resolved.kv_cache_memory_bytes == unlimited.kv_cache_memory_bytes:
        return f"full length for {config.max_num_seqs} sequences; more cannot be used", True
    if device.type == "cpu":
        return "a quarter of the memory that is available now", False
    return f"what is left of {config.gpu_memory_utilization:.0%} of the device's memory", False


def _notes(
    outline: torch.nn.Module,
    device: torch.device,
    choice: BackendChoice,
    is_cap_exact: bool,
    figures: dict[str, Any],
) -> tuple[str, ...]:
    notes = []
    if figures["max_full_length_seqs"] == 0:
        notes.append(
            "None of full length fits: a request that grows beyond "
            f"{figures['max_seq_tokens']} tokens ends with an error, alone."
        )
    notes += ["Whether the model passes the load probe is known once its weights are loaded."]
    if not is_cap_exact:
        notes.append(
            "The cap follows the memory that is available when the engine starts; "
            "--kv-cache-memory-bytes fixes it."
        )
    estimate = "The workspace is an estimate: attention kernels and torch's allocator take more"
    estimate += ", and so do the experts." if has_experts(outline) else "."
    notes.append(estimate)
    if device.type == "cuda":
        notes.append("What CUDA graphs and libraries take of the GPU shows when it starts.")
    if choice.driver == "torch":
        notes.append("The paged backend takes the whole cap when it starts.")
    return tuple(notes)


def _rank_notes(num_ranks: int, device: torch.device) -> tuple[str, ...]:
    if num_ranks == 1:
        return ()
    notes = [
        f"Sizes are those of each of the {num_ranks} ranks; the weights are told from the model's "
        "plan, and the workspace is that of the whole model."
    ]
    if device.type == "cpu":
        notes.append("On the CPU all ranks take them from the same memory.")
    return tuple(notes)

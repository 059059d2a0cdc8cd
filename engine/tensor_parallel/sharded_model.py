"""Loads this rank's share of a model, as transformers shards it.

Owns: nothing; the model is the caller's.  Thread-safety: stateless; all ranks load in lock step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from ..errors import UnsupportedModelError
from ..model_loader import (
    check_weights,
    loading_error,
    outline_model,
    read_config,
    text_config,
    vocab_size,
)
from ..probe import RELATIVE_TOLERANCE, relative_difference
from .rank_share import RankShare, mark_share
from .sharding_checks import PLAN_CHECK, check_shardable, has_whole_heads, leaf

TRIAL_TOKENS = 8
"""What the ranks compute once to see that they agree."""

__all__ = ["check_shardable", "load_sharded_model"]


def load_sharded_model(
    name: str,
    dtype: str,
    device: torch.device,
    rank: int,
    size: int,
    when_loaded: Callable[[torch.nn.Module], None] = lambda model: None,
) -> torch.nn.Module:
    """Load what rank ``rank`` of ``size`` holds of a model, straight onto ``device``.

    Every rank of torch's default process group must call it, with the same ``name`` and ``dtype``.
    ``when_loaded`` is called before the ranks compute together, for which one may be ready long
    after another. Each rank reads only its own rows and columns of the checkpoint. Where there are
    fewer KV heads than ranks, rank ``r`` holds KV head ``r * num_kv_heads // size``, which others
    hold too.

    Raises as ``load_model`` and ``check_shardable`` do.
    """
    config, is_local, torch_dtype = read_config(name, dtype, device)
    check_shardable(name, config, size)
    outline: Any = outline_model(name, dtype, device)
    plan = _complete_plan(outline, size)
    kv_projections = _replicated_projections(outline, plan, size)
    own_plan = {key: plan[key] for key in plan if key not in kv_projections}
    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("tp",))
    model_class = _placed(type(outline), device, _Mesh(mesh))
    try:
        model, loading = model_class.from_pretrained(
            name,
            config=outline.config,
            dtype=torch_dtype,
            local_files_only=is_local,
            output_loading_info=True,
            distributed_config=DistributedConfig(
                tp_size=size, tp_plan=_overrides(outline, own_plan)
            ),
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise loading_error(name, config, error) from error
    check_weights(name, loading)
    model.__class__ = type(outline)
    _check_summed_experts(name, model, plan)
    share = RankShare(rank, size, has_whole_heads(plan))
    if kv_projections:
        _keep_own_kv_head(model, kv_projections, share)
    mark_share(model, share, mesh)
    when_loaded(model)
    check_ranks_agree(name, model)
    module: torch.nn.Module = model.eval()
    return module


def _complete_plan(outline: Any, size: int) -> dict[str, str]:
    """The plan of the whole model, less what names nothing and what need not be cut unevenly."""
    plan: dict[str, str] = {}
    parameters = {_pattern(name) for name, _ in outline.named_parameters()}
    for pattern, style in outline.tp_plan.items():
        modules = [module for _, module in _matching(outline, pattern)]
        widths = {module.weight.shape[0] for module in modules if style in _OPTIONAL_STYLES}
        if any(width % size for width in widths):
            continue
        if modules or pattern in parameters:
            plan[pattern] = style
    return plan


def _pattern(name: str) -> str:
    """``"layers.*.weight"`` of ``"layers.3.weight"``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


_OPTIONAL_STYLES = frozenset({"colwise_gather_output", "embedding_rowwise"})
"""Styles whose output is whole on every rank; so it is where the weights are whole, too."""


def _matching(model: torch.nn.Module, pattern: str) -> list[tuple[str, Any]]:
    """Modules that a pattern of a plan names."""
    return [(name, one) for name, one in model.named_modules() if _pattern(name) == pattern]


def _overrides(outline: Any, plan: dict[str, str]) -> dict[str, str]:
    """``plan`` in the form that makes transformers forget the rules that it lacks."""
    # From 5.18 on the model's own rules hold where ours say nothing; before, ours are all.
    if "replicate" in ALL_PARALLEL_STYLES:
        return {pattern: plan.get(pattern, "replicate") for pattern in outline.tp_plan}
    return plan


def _placed(model_class: type[Any], device: torch.device, mesh: _Mesh) -> type[Any]:
    """``model_class`` as a class that loads onto ``device``, sharded over ``mesh``.

    Left to itself transformers would choose the device by what the machine has and the
    environment says, and ask for a library that is used only over several devices.
    """

    class Placed(model_class):  # type: ignore[misc]
        @classmethod
        def prepare_distribute_model(
            cls, distributed_config: Any, device_map: Any = None, device_mesh: Any = None
        ) -> tuple[Any, Any, Any]:
            has_managers = hasattr(model_class, "_mesh_manager")
            return distributed_config, None, mesh if has_managers else mesh.get_mesh("tp")

        @staticmethod
        def _load_pretrained_model(
            model: Any, state_dict: Any, files: Any, config: Any, *more: Any, **options: Any
        ) -> Any:
            config = dataclasses.replace(config, device_map={"": device})
            return model_class._load_pretrained_model(
                model, state_dict, files, config, *more, **options
            )

        @staticmethod
        def _finalize_model_loading(model: Any, config: Any, *more: Any) -> Any:
            config = dataclasses.replace(config, device_map={"": device})
            return model_class._finalize_model_loading(model, config, *more)

    for attribute in ("__module__", "__name__", "__qualname__"):
        setattr(Placed, attribute, getattr(model_class, attribute))
    return Placed


class _Mesh:
    """Answers newer transformers for each of its dimensions with the only one there is."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        return self._mesh


def _replicated_projections(outline: Any, plan: dict[str, str], size: int) -> list[str]:
    """Patterns of projections to KV heads, where these are fewer than the ranks."""
    num_kv_heads = getattr(text_config(outline), "num_key_value_heads", None)
    if not num_kv_heads or num_kv_heads % size == 0:
        return []
    return [
        pattern
        for pattern, style in plan.items()
        if style == "colwise" and leaf(pattern) in ("k_proj", "v_proj")
    ]


def _check_summed_experts(name: str, model: Any, plan: dict[str, str]) -> None:
    """Refuse experts with a weight that every rank has whole: the ranks' sum would count it often.

    Plans name the weights of experts one by one, and can miss one, such as a bias.
    """
    for pattern in (pattern for pattern, style in plan.items() if style == "moe_tp_experts"):
        for where, experts in _matching(model, pattern):
            for key, weight in experts.named_parameters():
                placements = getattr(weight, "placements", ())
                if all(placement.is_replicate() for placement in placements):
                    raise UnsupportedModelError(
                        name, PLAN_CHECK, f"{where} is summed over ranks, and {key} is not sharded"
                    )


@torch.inference_mode()
def check_ranks_agree(name: str, model: Any) -> None:
    """Raise ``UnsupportedModelError`` unless all ranks come to the same last hidden states.

    They do not where a plan leaves a sum over them incomplete, and logits need not show it: the
    ranks put them together from a part of each. All ranks call this together.
    """
    weight = next(model.parameters())
    input_ids = torch.arange(TRIAL_TOKENS, device=weight.device).unsqueeze(0) % vocab_size(model)
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].float())
    )
    try:
        model(input_ids=input_ids, use_cache=False)
    except Exception as error:
        reason = f"its forward pass fails when sharded: {type(error).__name__}: {error}"
        raise UnsupportedModelError(name, PLAN_CHECK, reason) from error
    finally:
        hook.remove()
    most, least = seen[0].clone(), seen[0].clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    difference = relative_difference(least, most)
    if difference > RELATIVE_TOLERANCE[weight.dtype]:
        reason = f"hidden states differ between ranks by {difference:.1e} of the largest one"
        raise UnsupportedModelError(name, PLAN_CHECK, reason)


def _keep_own_kv_head(model: Any, patterns: list[str], share: RankShare) -> None:
    """Cut whole K and V projections down to the one head that this rank's queries look at."""
    config = text_config(model)
    num_kv_heads = config.num_key_value_heads
    head = share.rank * num_kv_heads // share.size
    for projection in (one for pattern in patterns for _, one in _matching(model, pattern)):
        head_dim = projection.out_features // num_kv_heads
        rows = slice(head * head_dim, (head + 1) * head_dim)
        for key, tensor in list(projection.named_parameters(recurse=False)):
            own = torch.nn.Parameter(tensor.detach()[rows].clone(), requires_grad=False)
            projection.register_parameter(key, own)
        projection.out_features = head_dim
    # Its own eager attention repeats each KV head for the queries that share it.
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = config.num_attention_heads // share.size

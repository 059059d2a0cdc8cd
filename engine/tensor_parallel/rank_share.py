"""The share of a sharded model that one rank has.

Owns: nothing but a mark on the model.  Thread-safety: stateless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_MARK = "_vmalloc_rank_share"
_MESH = "_vmalloc_rank_mesh"


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank holds of a model.

    Attributes:
        rank: which one, from 0.
        size: ranks in all.
        has_whole_heads: every rank computes all heads, as where one projection gives queries, keys
            and values or a norm spans the heads; only the other weights are sharded.
    """

    rank: int
    size: int
    has_whole_heads: bool

    def num_kv_heads(self, num_all: int) -> int:
        """KV heads here of a layer that has ``num_all``."""
        return num_all if self.has_whole_heads else max(num_all // self.size, 1)


def mark_share(model: torch.nn.Module, share: RankShare, mesh: Any = None) -> None:
    """Note on a model which share of it this process has, and over which mesh."""
    setattr(model, _MARK, share)
    setattr(model, _MESH, mesh)


def share_of(model: torch.nn.Module) -> RankShare | None:
    """What ``mark_share`` noted; None for a whole model."""
    share: RankShare | None = getattr(model, _MARK, None)
    return share


def forget_groups(model: torch.nn.Module) -> None:
    """Let the weights of a model that nobody computes with any more hold no process group.

    torch caches how sharded tensors combine for good, and with it their mesh; newer versions of a
    mesh know its process groups, and these the sockets to the other ranks.
    """
    meshes = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    for mesh in (*meshes, getattr(model, _MESH, None)):
        groups = getattr(mesh, "_pg_registry", None)
        if groups:
            groups.clear()

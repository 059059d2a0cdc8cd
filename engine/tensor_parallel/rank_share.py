"""The share of a sharded model that one rank has.

Owns: nothing but a mark on the model.  Thread-safety: stateless.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MARK = "_vmalloc_rank_share"


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


def mark_share(model: torch.nn.Module, share: RankShare) -> None:
    """Note on a model which share of it this process has."""
    setattr(model, _MARK, share)


def share_of(model: torch.nn.Module) -> RankShare | None:
    """What ``mark_share`` noted; None for a whole model."""
    share: RankShare | None = getattr(model, _MARK, None)
    return share

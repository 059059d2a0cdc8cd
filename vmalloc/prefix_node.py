"""Nodes of the prefix index, and what is asked of one node or one path.

Owns: nothing; ``PrefixIndex`` owns the trie.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Pages = tuple[Any, ...]
"""What a backend calls its pages; the index only passes them on and counts them."""


class PrefixNode:
    """One step of a cached prefix; depth 0 is the root of one salt.

    Attributes:
        parent: the node before, None for a root.
        tokens: its own tokens.
        end: tokens from the root, its own included.
        depth: nodes from the root, itself included.
        pages: the backend's names of the pages that it refers to.
        children: the nodes after, by their tokens.
        is_tail: whether it is a partly filled leaf.
        salt: its root's salt.
        num_locks: live sequences that stand here.
        num_pins: pins of it and of nodes below.
        last_use: logical time of its last use; a use of a descendant may be newer.
    """

    __slots__ = (
        "chain_hash",
        "children",
        "depth",
        "end",
        "in_heap",
        "is_attached",
        "is_tail",
        "last_use",
        "num_locks",
        "num_pins",
        "order",
        "pages",
        "parent",
        "replaced_by",
        "salt",
        "tokens",
    )

    def __init__(
        self,
        parent: PrefixNode | None,
        tokens: tuple[int, ...],
        pages: Pages,
        *,
        is_tail: bool = False,
        salt: str = "",
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.is_tail = is_tail
        self.salt: str = salt if parent is None else parent.salt
        self.end: int = 0 if parent is None else parent.end + len(tokens)
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.order: list[tuple[int, ...]] = []  # keys of children, sorted
        # Names the tokens from the root, whatever the salt; used for miss reasons only.
        self.chain_hash: int = 0 if parent is None else hash((parent.chain_hash, tokens))
        self.num_locks = 0
        self.num_pins = 0
        self.last_use = 0
        self.in_heap = False
        self.is_attached = True
        self.replaced_by: PrefixNode | None = None


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix of some tokens.

    Attributes:
        path: deepest full node that matches whole (a root if none does).
        tail: child of ``path``, full or tail, that shares the most further tokens; or None.
        num_tail_tokens: how many leading tokens of ``tail`` match.
        miss_reason: why the rest is not there, ``""`` if nothing is missing.
    """

    path: PrefixNode
    tail: PrefixNode | None
    num_tail_tokens: int
    miss_reason: str

    @property
    def num_tokens(self) -> int:
        """Leading tokens that are cached."""
        return self.path.end + self.num_tail_tokens


def is_evictable(node: PrefixNode) -> bool:
    """Whether nothing needs the node: it is a leaf, and neither locked nor pinned."""
    return (
        node.is_attached
        and node.parent is not None
        and not (node.children or node.num_locks or node.num_pins)
    )


def closest_child(node: PrefixNode, tokens: tuple[int, ...]) -> tuple[PrefixNode | None, int]:
    """The child that shares the most leading tokens, and how many; (None, 0) if none does."""
    place = bisect_left(node.order, tokens)
    best, num_best = None, 0
    for neighbour in node.order[max(place - 1, 0) : place + 1]:
        num_shared = num_common(neighbour, tokens)
        if num_shared > num_best:
            best, num_best = node.children[neighbour], num_shared
    return best, num_best


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def tokens_from_root(node: PrefixNode) -> list[int]:
    """The whole prefix that ends with ``node``."""
    parts = []
    step: PrefixNode | None = node
    while step is not None:
        parts.append(step.tokens)
        step = step.parent
    return [token for part in reversed(parts) for token in part]


def all_nodes(roots: Iterable[PrefixNode]) -> Iterator[PrefixNode]:
    """Every node below ``roots``, parents first."""
    stack = [child for root in roots for child in root.children.values()]
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()


def current_node(node: PrefixNode) -> PrefixNode:
    """The node that took a replaced tail's place, with its locks and pins."""
    while node.replaced_by is not None:
        node = node.replaced_by
    return node

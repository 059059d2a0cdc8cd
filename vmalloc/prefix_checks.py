"""Recount what the prefix index's books say, from the trie alone.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import InvariantError
from .prefix_node import PrefixNode, all_nodes, is_evictable


@dataclass(frozen=True, slots=True)
class TrieCounts:
    """What the trie holds, counted."""

    num_nodes: int
    cached_pages: int
    pinned_pages: int
    num_with_hash: Counter[int]


def recount(
    roots: Iterable[PrefixNode], boundary: Callable[[int], int], pinned: Iterable[PrefixNode]
) -> TrieCounts:
    """Check every node of the trie, and count; ``pinned`` names a node once for each pin.

    Raises:
        InvariantError: naming what is wrong with a node.
    """
    roots = list(roots)
    for root in roots:
        _check(root.parent is None and root.is_attached, f"root of salt {root.salt!r}")
        _check(root.order == sorted(root.children), f"order of children of root {root.salt!r}")
    nodes = list(all_nodes(roots))
    for node in nodes:
        _check_node(node, boundary)
    num_pins: Counter[int] = Counter()
    for node in pinned:
        step: PrefixNode | None = node
        while step is not None:
            num_pins[id(step)] += 1
            step = step.parent
    _check(all(node.num_pins == num_pins[id(node)] for node in nodes), "number of pins")
    return TrieCounts(
        num_nodes=len(nodes),
        cached_pages=sum(len(node.pages) for node in nodes),
        pinned_pages=sum(len(node.pages) for node in nodes if node.num_pins),
        num_with_hash=Counter(node.chain_hash for node in nodes if not node.is_tail),
    )


def check_equal(what: str, booked: object, counted: object) -> None:
    """Raise ``InvariantError`` where the books and a count differ."""
    if booked != counted:
        raise InvariantError(f"prefix index: {what}: {booked} in the books, {counted} counted")


def _check_node(node: PrefixNode, boundary: Callable[[int], int]) -> None:
    parent, where = node.parent, f"of the prefix node that ends at token {node.end}"
    assert parent is not None
    span, num_tokens = boundary(node.depth) - parent.end, len(node.tokens)
    _check(node.is_attached and parent.children.get(node.tokens) is node, f"parent {where}")
    _check(node.end == parent.end + num_tokens, f"end {where}")
    _check(0 < num_tokens < span if node.is_tail else num_tokens == span, f"length {where}")
    _check(not (node.is_tail and node.children), f"children of the tail {where}")
    _check(node.order == sorted(node.children), f"order of children {where}")
    _check(node.in_heap or not is_evictable(node), f"place in the LRU order {where}")
    place = bisect_left(parent.order, node.tokens) + 1
    if node.is_tail and place < len(parent.order):
        _check(parent.order[place][:num_tokens] != node.tokens, f"redundant tail {where}")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(f"prefix index: wrong {what}")

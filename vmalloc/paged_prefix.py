"""How sequences of the paged backend share prefixes: where each stands in the prefix index.

Owns: the prefix index over blocks.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .block_pool import BlockPool, Blocks
from .prefix_index import PrefixIndex
from .prefix_node import Pages, PrefixMatch, PrefixNode


@dataclass(slots=True)
class PrefixPlace:
    """Where one sequence stands in the index.

    Attributes:
        salt: whom it shares prefixes with; None: nobody.
        node: the deepest node that is known to hold its tokens; it may have left since.
        locked: the deepest node on the way there with nothing but the sequence's own blocks up to
            it. Only this one is locked, so that whatever is merely cached can be evicted.
        token_ids: its tokens as last registered, the engine's own list.
        num_tokens: how many of them its rows hold.
    """

    salt: str | None
    node: PrefixNode
    locked: PrefixNode
    token_ids: Sequence[int] = ()
    num_tokens: int = 0


class SequencePrefixes:
    """The prefix index, and every sequence's walk along it.

    Attributes:
        index: the index; its pages are ``(block,)``.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled
        self.index = PrefixIndex(
            boundary=lambda k: k * block_size,
            retain=lambda pages: pool.add_refs(_block_ids(pages)),
            release=lambda pages: pool.drop_refs(_block_ids(pages)),
            on_pin=self._note_pin,
        )

    def enter(self, salt: str | None, path: PrefixNode | None = None) -> PrefixPlace:
        """A place for a new sequence that has the blocks up to ``path``; None: none."""
        node = self.index.root(salt or "") if path is None else path
        self.index.lock(node)
        return PrefixPlace(salt, node, node)

    def enter_at(self, place: PrefixPlace, num_tokens: int) -> PrefixPlace:
        """A place for a sequence that has the first ``num_tokens`` rows of the one at ``place``."""
        num_known = min(place.num_tokens, num_tokens)
        twin = PrefixPlace(
            place.salt, place.node, place.locked, tuple(place.token_ids[:num_known]), num_known
        )
        twin.locked = twin.node = _ancestor(place.locked, num_tokens)
        self.index.lock(twin.locked)
        return twin

    def register(
        self, place: PrefixPlace, token_ids: Sequence[int], num_tokens: int, blocks: Blocks
    ) -> None:
        """Offer the full blocks among the first ``num_tokens`` rows to others."""
        if place.salt is None or not self._enabled:
            return
        place.token_ids = token_ids
        place.num_tokens = num_tokens
        self._advance(place, blocks)

    def truncate(self, place: PrefixPlace, num_tokens: int) -> None:
        """Step back to where the first ``num_tokens`` rows end."""
        place.num_tokens = min(place.num_tokens, num_tokens)
        place.node = _ancestor(place.node, num_tokens)
        locked = _ancestor(place.locked, num_tokens)
        if locked is not place.locked:
            self._move_lock(place, locked)

    def leave(self, place: PrefixPlace, blocks: Blocks, *, keep_tail: bool) -> None:
        """Unlock the sequence's place; ``keep_tail``: leave its last, partly filled block here."""
        if keep_tail and place.num_tokens:
            self._advance(place, blocks)
            node = place.node
            tokens = place.token_ids[node.end : place.num_tokens]
            if tokens:
                self.index.insert_tail(node, tokens, (int(blocks[node.depth]),))
        self.index.unlock(place.locked)

    def return_to_root(self, place: PrefixPlace) -> None:
        """Enter again after ``leave``, with blocks of its own and the same registered tokens."""
        place.node = place.locked = self.index.root(place.salt or "")
        self.index.lock(place.locked)

    def _advance(self, place: PrefixPlace, blocks: Blocks) -> None:
        """Enter every full block that is not in the index yet."""
        node = place.node
        if not node.is_attached:
            node = place.locked
        while node.end + self._block_size <= place.num_tokens:
            tokens = place.token_ids[node.end : node.end + self._block_size]
            block = int(blocks[node.depth])
            child = self.index.insert(node, tokens, (block,))
            if place.locked is node and child.pages[0] == block:
                self._move_lock(place, child)
            node = child
        place.node = node

    def _move_lock(self, place: PrefixPlace, node: PrefixNode) -> None:
        self.index.lock(node)
        self.index.unlock(place.locked)
        place.locked = node

    def _note_pin(self, pages: Pages, change: int) -> None:
        if change > 0:
            self._pool.add_holds(_block_ids(pages), with_refs=False)
        else:
            self._pool.drop_holds(_block_ids(pages), with_refs=False)


def path_blocks(match: PrefixMatch) -> Blocks:
    """The blocks of the full nodes of a match, in order."""
    blocks = np.empty(match.path.depth, np.int32)
    node = match.path
    while node.parent is not None:
        blocks[node.depth - 1] = node.pages[0]
        node = node.parent
    return blocks


def _block_ids(pages: Pages) -> Blocks:
    return np.array(pages, np.int32)


def _ancestor(node: PrefixNode, num_tokens: int) -> PrefixNode:
    """The deepest node on the way to ``node`` that ends within ``num_tokens``."""
    while node.end > num_tokens:
        assert node.parent is not None
        node = node.parent
    return node

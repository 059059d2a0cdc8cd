"""Which cached prefix every slot's sequence stands at, and what a hit gives a new one.

Owns: the prefix index of a ``VirtualKVCache``, and its lock for each live sequence.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import _core
from .backend import PrefixHit
from .layout import KVLayout
from .page_steps import PageSteps
from .prefix_index import PrefixIndex
from .prefix_node import PrefixMatch, PrefixNode

PageRef = tuple[int, int, int]
"""Region, number of the page in its slot, id of the page."""


@dataclass(slots=True)
class SequencePrefix:
    """How much of a sequence the index knows.

    Attributes:
        node: the deepest node that is known to hold its tokens; it may have left since.
        locked: the deepest node with nothing but the sequence's own pages on the way to it. Only
            this one is locked, so that whatever is merely cached can be evicted.
        next_end: tokens after which the pages behind ``node`` are full.
        token_ids: its tokens, as far as they were registered; the engine's own list.
        num_known: of those, how many have their K and V in the cache.
    """

    node: PrefixNode
    locked: PrefixNode
    next_end: int
    token_ids: Sequence[int] = ()
    num_known: int = 0


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """A hit, made concrete.

    Attributes:
        num_tokens: rows that the pages hold.
        node: where a sequence that starts with them stands.
        needed: to be locked until its pages are in use.
        start: the pages, for the arena.
    """

    num_tokens: int
    node: PrefixNode
    needed: PrefixNode
    start: _core.Prefix


class CachedPages:
    """What the index asks of the arena. Apart from ``SlotPrefixes``, or the two would hold each
    other, and with them a cache that nobody closed.

    Attributes:
        slot: whose pages are being put into the index.
    """

    def __init__(self, arena: _core.KVArena) -> None:
        self._arena = arena
        self.slot = -1

    def retain(self, pages: tuple[PageRef, ...]) -> None:
        self._arena.cache_pages(self.slot, [page[0] for page in pages], [page[1] for page in pages])

    def release(self, pages: tuple[PageRef, ...]) -> int:
        return self._arena.uncache_pages([page[2] for page in pages])

    def note_pin(self, pages: tuple[PageRef, ...], change: int) -> None:
        ids = [page[2] for page in pages]
        if change > 0:
            self._arena.pin_pages(ids)
        else:
            self._arena.unpin_pages(ids)


class SlotPrefixes:
    """The prefix index over the pages of an arena's slots."""

    def __init__(self, arena: _core.KVArena, layout: KVLayout) -> None:
        self._arena = arena
        self._steps = PageSteps(layout.row_bytes, layout.page_bytes)
        self._num_regions = len(layout.row_bytes)
        self._sequences: dict[int, SequencePrefix] = {}
        self._cached = CachedPages(arena)
        self.index = PrefixIndex(
            self._steps.end, self._cached.retain, self._cached.release, self._cached.note_pin
        )

    def match(self, token_ids: Sequence[int], salt: str) -> PrefixHit:
        """The longest cached prefix, as far as the index tells; ``find`` may have to give less."""
        found = self.index.match(token_ids, salt)
        return PrefixHit(
            num_tokens=found.num_tokens,
            token_ids=tuple(token_ids),
            salt=salt,
            miss_reason=found.miss_reason,
            path=found,
        )

    def find(self, hit: PrefixHit, limit: int, *, with_end: bool = True) -> FoundPrefix | None:
        """Pages that hold the first tokens of ``hit``, at most ``limit`` of them.

        ``with_end``: also those of others, to copy what follows the last full node from.
        """
        match = hit.path
        if not isinstance(match, PrefixMatch) or not _is_current(match):
            match = self.index.match(hit.token_ids, hit.salt)
        below = self._nodes_below(match) if with_end else []
        pages = self._pages_on(match.path, below)
        most = match.num_tokens if with_end else match.path.end
        for region, by_number in enumerate(pages):  # by number, they leave no gap on a path
            most = min(most, self._steps.whole_rows(region, len(by_number)))
        num_tokens = min(most, limit)
        if num_tokens <= 0:
            return None
        return FoundPrefix(
            num_tokens,
            node=_node_at(match.path, num_tokens),
            needed=below[-1] if below else match.path,
            start=self._start(num_tokens, pages),
        )

    def start(self, seq_id: int, salt: str, node: PrefixNode | None = None) -> None:
        """Follow a sequence that has the pages up to ``node``, or none yet."""
        node = node or self.index.root(salt)
        self.index.lock(node)
        self._sequences[seq_id] = SequencePrefix(node, node, self._steps.end(node.depth + 1))

    def register(self, seq_id: int, slot: int, token_ids: Sequence[int], num_tokens: int) -> None:
        """Put the pages that became full into the index."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        sequence.token_ids = token_ids
        sequence.num_known = num_tokens
        if sequence.next_end <= num_tokens:
            self._advance(sequence, slot)

    def _advance(self, sequence: SequencePrefix, slot: int) -> None:
        """Enter every page that is full and not in the index yet."""
        if not sequence.node.is_attached:
            self._stand_at(sequence, sequence.locked)
        self._cached.slot = slot
        while sequence.next_end <= sequence.num_known:
            node = sequence.node
            tokens = tuple(sequence.token_ids[node.end : sequence.next_end])
            pages = self._refs(slot, *self._steps.pages(node.depth + 1))
            child = self.index.insert(node, tokens, pages)
            if sequence.locked is node and child.pages == pages:
                self._move_lock(sequence, child)
            self._stand_at(sequence, child)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Forget what the sequence had registered beyond ``num_tokens``."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        sequence.num_known = min(sequence.num_known, num_tokens)
        self._move_lock(sequence, _node_at(sequence.locked, num_tokens))
        self._stand_at(sequence, _node_at(sequence.node, num_tokens))

    def copy(self, from_seq: int, to_seq: int, num_tokens: int) -> None:
        """Let ``to_seq`` stand where the first ``num_tokens`` tokens of ``from_seq`` do."""
        sequence = self._sequences.get(from_seq)
        if sequence is not None:
            self._start_like(sequence, to_seq, num_tokens)

    def end(self, seq_id: int, slot: int | None = None) -> None:
        """Stop following; with ``slot``, leave the partly full pages to the index first."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        if slot is not None:
            self._advance(sequence, slot)
            self._insert_tail(sequence, slot)
        del self._sequences[seq_id]
        self.index.unlock(sequence.locked)

    def restart(self, seq_id: int) -> None:
        """The sequence has no pages for now: it stands at the root."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            self._move_lock(sequence, self.index.root(sequence.node.salt))
            self._stand_at(sequence, sequence.locked)

    def resume(self, seq_id: int, slot: int) -> None:
        """It has pages again, in ``slot``: offer what it had registered."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            self._advance(sequence, slot)

    def rename(self, sources: dict[int, int], num_tokens: int) -> None:
        """Let every key stand where its value stood, all at once."""
        moved = {seq_id: source for seq_id, source in sources.items() if seq_id != source}
        old = {seq_id: self._sequences.pop(seq_id, None) for seq_id in moved}
        for seq_id, source in moved.items():
            before = old[source] if source in old else self._sequences.get(source)
            if before is not None:
                self._start_like(before, seq_id, num_tokens)
        for sequence in old.values():
            if sequence is not None:
                self.index.unlock(sequence.locked)

    def page_ids(self) -> list[int]:
        """Ids of all pages in the index."""
        return [page for node in self.index.nodes() for _, _, page in node.pages]

    def _start_like(self, sequence: SequencePrefix, seq_id: int, num_tokens: int) -> None:
        node = _node_at(sequence.locked, num_tokens)
        self.start(seq_id, node.salt, node)
        twin = self._sequences[seq_id]
        twin.num_known = min(sequence.num_known, num_tokens)
        # A copy: the lists of the two go different ways from here.
        twin.token_ids = tuple(sequence.token_ids[: twin.num_known])

    def _stand_at(self, sequence: SequencePrefix, node: PrefixNode) -> None:
        sequence.node = node
        sequence.next_end = self._steps.end(node.depth + 1)

    def _move_lock(self, sequence: SequencePrefix, node: PrefixNode) -> None:
        if node is not sequence.locked:
            self.index.lock(node)
            self.index.unlock(sequence.locked)
            sequence.locked = node

    def _insert_tail(self, sequence: SequencePrefix, slot: int) -> None:
        node, num_tokens = sequence.node, sequence.num_known
        regions = [r for r in range(self._num_regions) if self._steps.has_part(r, num_tokens)]
        if num_tokens <= node.end or not regions or not node.is_attached:
            return
        numbers = [self._steps.full_pages(region, num_tokens) for region in regions]
        self._cached.slot = slot
        tokens = sequence.token_ids[node.end : num_tokens]
        self.index.insert_tail(node, tokens, self._refs(slot, regions, numbers))

    def _refs(
        self, slot: int, regions: Sequence[int], numbers: Sequence[int]
    ) -> tuple[PageRef, ...]:
        ids = self._arena.page_ids(slot, regions, numbers)
        return tuple(zip(regions, numbers, ids, strict=True))

    def _nodes_below(self, match: PrefixMatch) -> list[PrefixNode]:
        """Nodes after the path whose pages the rest of the matched rows can be copied from.

        Where the regions fill their pages at different tokens, one node may not have them all.
        """
        missing = {
            (region, self._steps.full_pages(region, match.num_tokens))
            for region in range(self._num_regions)
            if self._steps.has_part(region, match.num_tokens)
        }
        nodes: list[PrefixNode] = []
        node = match.tail or self.index.any_child(match.path)
        while missing and node is not None:
            nodes.append(node)
            missing -= {(region, number) for region, number, _ in node.pages}
            node = self.index.any_child(node)
        return nodes

    def _pages_on(self, path: PrefixNode, below: list[PrefixNode]) -> list[dict[int, int]]:
        """By region and page number, the pages of the path and of nodes below it."""
        pages: list[dict[int, int]] = [{} for _ in range(self._num_regions)]
        step: PrefixNode | None = path
        while step is not None:
            for region, number, page in step.pages:
                pages[region][number] = page
            step = step.parent
        for node in below:
            for region, number, page in node.pages:
                pages[region].setdefault(number, page)
        return pages

    def _start(self, num_tokens: int, pages: list[dict[int, int]]) -> _core.Prefix:
        """What a slot needs to start with ``num_tokens``. Requires: their pages."""
        shared: list[list[int]] = []
        tails: list[int | None] = []
        for region, by_number in enumerate(pages):
            num_full = self._steps.full_pages(region, num_tokens)
            shared.append([by_number[number] for number in range(num_full)])
            has_part = self._steps.has_part(region, num_tokens)
            tails.append(by_number[num_full] if has_part else None)
        return _core.Prefix(num_rows=num_tokens, pages=shared, tails=tails)


def _is_current(match: PrefixMatch) -> bool:
    return match.path.is_attached and (match.tail is None or match.tail.is_attached)


def _node_at(node: PrefixNode, num_tokens: int) -> PrefixNode:
    """The deepest node of the path to ``node`` that ends by ``num_tokens``."""
    while node.end > num_tokens:
        assert node.parent is not None
        node = node.parent
    return node

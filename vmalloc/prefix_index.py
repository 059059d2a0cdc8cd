"""Which pages hold the K and V of which token prefixes: a trie that belongs to no slot.

Owns: the trie, its LRU order, locks, pins and hit counts. The pages are the backend's; the index
holds references to them.  Thread-safety: none; one engine thread.

A *full* node at depth k holds the pages that its last token completes, so nobody writes them again.
A *tail* is a leaf with fewer tokens: the partly filled pages of an ended sequence, to be copied
from. Children are found by their tokens and never by a hash alone, so what is found is what was
asked for. Siblings are kept in lexicographic order, where the one that shares most leading tokens
with a query is next to the query's place, and where a tail that is a prefix of its right neighbour
would be redundant: there is none.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

from .backend import MISS_REASONS, PrefixCacheStats
from .errors import InvariantError
from .prefix_checks import check_equal, recount
from .prefix_lru import EvictionQueue
from .prefix_node import (
    Pages,
    PrefixMatch,
    PrefixNode,
    all_nodes,
    closest_child,
    current_node,
    num_common,
    tokens_from_root,
)

MAX_EVICTED = 65_536
"""Evicted nodes that are remembered, to tell an evicted prefix from one that was never seen."""

_MIN_ROOTS = 1024


class PrefixIndex:
    """A trie of page references with LRU eviction.

    A caller that keeps a node between calls, a root too, locks it: an unlocked node may leave.
    """

    def __init__(
        self,
        boundary: Callable[[int], int],
        retain: Callable[[Pages], None],
        release: Callable[[Pages], int],
        on_pin: Callable[[Pages, int], None] | None = None,
    ) -> None:
        """Make an empty index.

        Args:
            boundary: tokens after which the k-th node of a path is complete, for k = 1, 2, ...;
                strictly increasing.
            retain: take one reference to each of a node's pages.
            release: drop them; returns how many pages nobody needs any more by it.
            on_pin: told of a node's pages and 1 when it becomes pinned, -1 when no longer.
        """
        self._boundary = boundary
        self._retain = retain
        self._release = release
        self._on_pin = on_pin
        self._roots: dict[str, PrefixNode] = {}
        self._max_roots = _MIN_ROOTS
        self._clock = 0
        self._queue = EvictionQueue()
        self._pins: dict[tuple[str, tuple[int, ...]], list[PrefixNode]] = {}
        self._evicted: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._num_with_hash: Counter[int] = Counter()
        self._num_nodes = 0
        self._cached_pages = 0
        self._pinned_pages = 0
        self._evicted_pages = 0
        self._num_lookups = 0
        self._queried_tokens = 0
        self._hit_tokens = 0
        self._misses = dict.fromkeys(MISS_REASONS, 0)

    @property
    def num_nodes(self) -> int:
        """Nodes, roots not counted."""
        return self._num_nodes

    @property
    def is_empty(self) -> bool:
        return self._num_nodes == 0

    def root(self, salt: str) -> PrefixNode:
        """The node that all prefixes under ``salt`` start from; made on first use."""
        node = self._roots.get(salt)
        if node is None:
            if len(self._roots) >= self._max_roots:
                self._drop_empty_roots()
            node = self._roots[salt] = PrefixNode(None, (), (), salt=salt)
        return node

    def match(
        self, token_ids: Sequence[int], salt: str = "", max_tokens: int | None = None
    ) -> PrefixMatch:
        """Longest cached prefix of ``token_ids[:max_tokens]``. Counts and touches nothing.

        The miss reason is the first of these that holds, where the next node is the full node that
        would have to follow ``path``:

        1. ``""``: everything was found;
        2. ``shorter_than_page``: the tokens end before the next node does;
        3. ``evicted``: the next node was there, and left for lack of memory;
        4. ``other_salt``: the next node, with all before it, is there under another salt;
        5. ``never_seen``.
        """
        limit = len(token_ids) if max_tokens is None else max(min(max_tokens, len(token_ids)), 0)
        node = self.root(salt)
        while True:
            end = self._boundary(node.depth + 1)
            rest = tuple(token_ids[node.end : min(end, limit)])
            child = node.children.get(rest) if end <= limit else None
            if child is None:
                break
            node = child
        tail, num_tail_tokens = closest_child(node, rest)
        reason = ""
        if node.end + num_tail_tokens < limit:
            reason = "shorter_than_page" if limit < end else self._why_missing(node, rest)
        return PrefixMatch(node, tail, num_tail_tokens, reason)

    def insert(self, node: PrefixNode, tokens: Sequence[int], pages: Pages) -> PrefixNode:
        """Add a full child; if it is there already, return that and take no reference.

        Raises:
            InvariantError: ``tokens`` do not fill one node, or ``node`` left the index.
        """
        tokens = tuple(tokens)
        span = self._check_parent(node)
        if len(tokens) != span:
            raise InvariantError(
                f"a full node at depth {node.depth + 1} has {span} tokens, not {len(tokens)}"
            )
        child = node.children.get(tokens)
        if child is None:
            child = self._add(PrefixNode(node, tokens, pages))
            self._evicted.pop((child.salt, child.chain_hash), None)
            self._num_with_hash[child.chain_hash] += 1
        self.touch(child)
        return child

    def insert_tail(
        self, node: PrefixNode, tokens: Sequence[int], pages: Pages
    ) -> PrefixNode | None:
        """Add a partly filled leaf; None if a child starts with these tokens already.

        Raises:
            InvariantError: ``tokens`` fill a node, or ``node`` left the index.
        """
        tokens = tuple(tokens)
        span = self._check_parent(node)
        if len(tokens) >= span:
            raise InvariantError(
                f"a tail at depth {node.depth + 1} has fewer than {span} tokens, not {len(tokens)}"
            )
        place = bisect_left(node.order, tokens)
        if not tokens or (place < len(node.order) and node.order[place][: len(tokens)] == tokens):
            return None
        tail = self._add(PrefixNode(node, tokens, pages, is_tail=True))
        self.touch(tail)
        return tail

    def any_child(self, node: PrefixNode) -> PrefixNode | None:
        """The oldest child of ``node``, full or tail."""
        return next(iter(node.children.values()), None)

    def touch(self, node: PrefixNode) -> None:
        """Note a use of ``node`` and all before it."""
        self._clock += 1
        node.last_use = self._clock
        self._queue.offer(node)

    def lock(self, node: PrefixNode) -> None:
        """Keep ``node`` and its ancestors: a live sequence stands at it."""
        if not node.is_attached:
            raise InvariantError(f"the prefix node that ends at token {node.end} left the index")
        node.num_locks += 1
        self.touch(node)

    def unlock(self, node: PrefixNode) -> None:
        """Undo one ``lock``."""
        node = current_node(node)
        if node.num_locks == 0:
            raise InvariantError(f"the prefix node that ends at token {node.end} is not locked")
        node.num_locks -= 1
        self.touch(node)
        self._drop_if_empty_root(node)

    def pin(self, token_ids: Sequence[int], salt: str = "") -> int:
        """Keep the cached prefix of ``token_ids``, its partial end too; the tokens pinned."""
        found = self.match(token_ids, salt)
        if found.num_tokens == 0:
            return 0
        node = found.tail or found.path
        # The count goes with the record: the prefix may grow while it is pinned.
        self._pins.setdefault((salt, tuple(token_ids)), []).append(node)
        self._change_pins(node, 1)
        return found.num_tokens

    def unpin(self, token_ids: Sequence[int], salt: str = "") -> int:
        """Undo the last ``pin`` of the same tokens; the tokens unpinned, 0 if there was none."""
        key = (salt, tuple(token_ids))
        records = self._pins.get(key)
        if not records:
            return 0
        pinned = records.pop()
        if not records:
            del self._pins[key]
        node = current_node(pinned)
        self._change_pins(node, -1)
        self.touch(node)
        return num_common(tokens_from_root(pinned), key[1])

    def evict(self, num_pages: int) -> int:
        """Drop least recently used leaves until ``num_pages`` are released; how many were."""
        num_freed = 0
        while num_freed < num_pages and (node := self._queue.pop()) is not None:
            if not node.is_tail:
                self._remember_evicted(node)
            self._evicted_pages += len(node.pages)
            num_freed += self._remove(node)
        return num_freed

    def flush(self) -> int:
        """Forget everything that is neither locked nor pinned; the pages released by it."""
        num_freed = 0
        while (node := self._queue.pop()) is not None:
            num_freed += self._remove(node)
        return num_freed

    def note_lookup(self, num_queried: int, num_hit: int, miss_reason: str) -> None:
        """Count one admitted sequence that was looked up."""
        self._num_lookups += 1
        self._queried_tokens += num_queried
        self._hit_tokens += num_hit
        if miss_reason:
            self._misses[miss_reason] += 1

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            num_lookups=self._num_lookups,
            queried_tokens=self._queried_tokens,
            hit_tokens=self._hit_tokens,
            misses=dict(self._misses),
            cached_pages=self._cached_pages,
            pinned_pages=self._pinned_pages,
            evicted_pages=self._evicted_pages,
        )

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node but the roots, parents first."""
        return all_nodes(self._roots.values())

    def check_invariants(self) -> None:
        """Recount everything from the trie; raise ``InvariantError`` for what differs."""
        pinned = [current_node(node) for records in self._pins.values() for node in records]
        counts = recount(self._roots.values(), self._boundary, pinned)
        check_equal("nodes", self._num_nodes, counts.num_nodes)
        check_equal("cached pages", self._cached_pages, counts.cached_pages)
        check_equal("pinned pages", self._pinned_pages, counts.pinned_pages)
        check_equal("nodes by chain hash", self._num_with_hash, counts.num_with_hash)

    def _check_parent(self, node: PrefixNode) -> int:
        """Tokens of a full child of ``node``, which must be able to have one."""
        if not node.is_attached or node.is_tail:
            raise InvariantError(f"a prefix node that ends at token {node.end} takes no child now")
        return self._boundary(node.depth + 1) - node.end

    def _why_missing(self, node: PrefixNode, tokens: tuple[int, ...]) -> str:
        chain_hash = hash((node.chain_hash, tokens))
        if (node.salt, chain_hash) in self._evicted:
            return "evicted"
        return "other_salt" if self._num_with_hash[chain_hash] else "never_seen"

    def _add(self, node: PrefixNode) -> PrefixNode:
        parent = node.parent
        assert parent is not None
        self._retain(node.pages)
        place = bisect_left(parent.order, node.tokens)
        left = parent.children[parent.order[place - 1]] if place else None
        parent.children[node.tokens] = node
        insort(parent.order, node.tokens)
        self._num_nodes += 1
        self._cached_pages += len(node.pages)
        if left is not None and left.is_tail and node.tokens[: len(left.tokens)] == left.tokens:
            self._replace_tail(left, node)
        return node

    def _replace_tail(self, tail: PrefixNode, node: PrefixNode) -> None:
        node.num_locks += tail.num_locks
        node.num_pins += tail.num_pins
        if tail.num_pins:
            self._note_pinned(node, 1)
            self._note_pinned(tail, -1)
        tail.replaced_by = node
        self._remove(tail)

    def _remove(self, node: PrefixNode) -> int:
        """Take a leaf out of the trie; the pages that nobody needs any more."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        del parent.order[bisect_left(parent.order, node.tokens)]
        node.is_attached = False
        self._num_nodes -= 1
        self._cached_pages -= len(node.pages)
        if not node.is_tail:
            self._num_with_hash[node.chain_hash] -= 1
            if not self._num_with_hash[node.chain_hash]:
                del self._num_with_hash[node.chain_hash]
        parent.last_use = max(parent.last_use, node.last_use)
        self._queue.offer(parent)
        self._drop_if_empty_root(parent)
        return self._release(node.pages)

    def _remember_evicted(self, node: PrefixNode) -> None:
        self._evicted[node.salt, node.chain_hash] = None
        if len(self._evicted) > MAX_EVICTED:
            self._evicted.popitem(last=False)

    def _drop_if_empty_root(self, node: PrefixNode) -> None:
        if node.parent is None and not node.children and not node.num_locks:
            node.is_attached = False
            del self._roots[node.salt]

    def _drop_empty_roots(self) -> None:
        """Forget salts that were asked for and never used; rare, so that it costs O(1) a root."""
        for root in list(self._roots.values()):
            self._drop_if_empty_root(root)
        self._max_roots = max(_MIN_ROOTS, 2 * len(self._roots))

    def _change_pins(self, node: PrefixNode, change: int) -> None:
        step: PrefixNode | None = node
        while step is not None:
            was_pinned = step.num_pins > 0
            step.num_pins += change
            if was_pinned != (step.num_pins > 0):
                self._note_pinned(step, change)
            step = step.parent

    def _note_pinned(self, node: PrefixNode, change: int) -> None:
        self._pinned_pages += change * len(node.pages)
        if self._on_pin is not None:
            self._on_pin(node.pages, change)

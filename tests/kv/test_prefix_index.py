"""PrefixIndex: exact matching to the token, LRU eviction, locks, pins, reasons of misses."""

import itertools
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vmalloc.prefix_index
from vmalloc import InvariantError
from vmalloc.backend import MISS_REASONS
from vmalloc.prefix_index import PrefixIndex


class Pages:
    """References to pages by name, as a backend would count them."""

    def __init__(self):
        self.refs = Counter()

    def retain(self, pages):
        self.refs.update(pages)

    def release(self, pages):
        for page in pages:
            assert self.refs[page] > 0
            self.refs[page] -= 1
        return sum(self.refs[page] == 0 for page in pages)


def uneven(k):
    """Ends of rows that straddle pages: steps of 4, 3, 4, 3, ..."""
    return 7 * k // 2 + k % 2


BOUNDARIES = {"blocks": lambda k: 4 * k, "uneven": uneven}


@pytest.fixture
def pages():
    return Pages()


@pytest.fixture
def index(pages):
    return PrefixIndex(BOUNDARIES["blocks"], pages.retain, pages.release)


def add(index, tokens, salt="", *, tail=True, pages=None):
    """Insert all of ``tokens``, as a sequence that ends does; the deepest full node."""
    names = iter(pages) if pages is not None else (object() for _ in itertools.count())
    node = index.root(salt)
    while index._boundary(node.depth + 1) <= len(tokens):
        own = tokens[node.end : index._boundary(node.depth + 1)]
        node = index.insert(node, own, (next(names),))
    if tail and len(tokens) > node.end:
        index.insert_tail(node, tokens[node.end :], (next(names),))
    index.check_invariants()
    return node


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_prefix_is_found_to_the_token(pages, boundary):
    index = PrefixIndex(BOUNDARIES[boundary], pages.retain, pages.release)
    tokens = list(range(23))
    add(index, tokens)
    for num_tokens in range(24):
        for query in (tokens[:num_tokens], [*tokens[:num_tokens], 99, 98, 97, 96, 95]):
            found = index.match(query)
            assert found.num_tokens == num_tokens
            assert found.num_tokens == found.path.end + found.num_tail_tokens
            assert (found.tail is None) == (found.num_tail_tokens == 0)
        assert index.match(tokens, max_tokens=num_tokens).num_tokens == num_tokens


def test_partial_match_picks_the_child_that_shares_most_among_thousands(index):
    for i in range(3000):
        index.insert(index.root(""), (1, i // 100, i % 100, 0), (i,))
    found = index.match([1, 7, 42, 5, 5, 5])
    assert found.path.depth == 0
    assert found.tail.pages == (742,)
    assert found.num_tail_tokens == 3
    index.check_invariants()


def test_first_pages_stay_when_the_same_tokens_come_again(index, pages):
    node = add(index, range(8), pages=["a", "b"])
    assert add(index, range(8), pages=["c", "d"]) is node
    assert node.pages == ("b",)
    assert pages.refs == {"a": 1, "b": 1}


def test_a_longer_tail_or_a_full_node_replaces_a_tail(index, pages):
    root = index.root("")
    assert index.insert_tail(root, (1,), ("a",))
    assert index.insert_tail(root, (1, 2), ("b",))
    assert index.insert_tail(root, (1, 2), ("x",)) is None
    assert index.insert_tail(root, (1,), ("x",)) is None
    assert index.insert_tail(root, (1, 3, 4), ("c",))
    assert index.num_nodes == 2
    assert +pages.refs == {"b": 1, "c": 1}
    full = index.insert(root, (1, 2, 3, 4), ("d",))
    assert index.insert_tail(root, (1, 2, 3), ("x",)) is None
    assert index.num_nodes == 2
    assert +pages.refs == {"c": 1, "d": 1}
    assert root.children[1, 2, 3, 4] is full
    assert root.children[1, 3, 4].is_tail
    index.check_invariants()


def test_eviction_takes_leaves_in_order_of_last_use(index, pages):
    for name, first in (("a", 0), ("b", 100), ("c", 200)):
        add(index, range(first, first + 8), pages=[name + "1", name + "2"])
    index.touch(index.match(range(8)).path)
    assert index.evict(1) == 1
    assert +pages.refs == dict.fromkeys(["a1", "a2", "b1", "c1", "c2"], 1)
    assert index.evict(2) == 2  # a cold chain goes whole before a warmer one is touched
    assert +pages.refs == {"a1": 1, "a2": 1, "c1": 1}
    assert index.evict(100) == 3
    assert index.is_empty
    assert index.stats().evicted_pages == 6
    index.check_invariants()


def test_a_touched_leaf_keeps_its_ancestors_warm(index, pages):
    add(index, range(8), pages=["a1", "a2"])
    add(index, range(100, 104), pages=["b"])
    index.touch(index.match(range(8)).path)
    index.evict(1)
    assert +pages.refs == {"a1": 1, "a2": 1}
    index.evict(1)
    add(index, range(200, 204), pages=["c"])
    index.evict(1)
    assert +pages.refs == {"c": 1}


def test_eviction_counts_what_became_free_and_goes_on(index, pages):
    add(index, range(12), pages=["a", "b", "c"])
    pages.retain(("b", "c"))  # a live sequence holds them as well
    assert index.evict(1) == 1
    assert index.is_empty
    assert +pages.refs == {"b": 1, "c": 1}


def test_locked_nodes_and_their_ancestors_stay(index, pages):
    middle = add(index, range(8), pages=["a", "b"])
    add(index, range(14), pages=["a", "b", "c", "tail"])
    index.lock(middle)
    assert index.evict(100) == 2
    assert +pages.refs == {"a": 1, "b": 1}
    index.unlock(middle)
    assert index.evict(100) == 2
    with pytest.raises(InvariantError, match="not locked"):
        index.unlock(middle)


def test_a_locked_root_outlives_its_last_child(index):
    root = index.root("salt")
    index.lock(root)
    add(index, range(4), "salt")
    index.flush()
    assert index.root("salt") is root
    index.insert(root, range(4), ("a",))
    index.unlock(root)
    assert index.match(range(4), "salt").num_tokens == 4


def test_nodes_that_left_are_refused(index):
    node = add(index, range(4))
    index.flush()
    with pytest.raises(InvariantError, match="left the index"):
        index.lock(node)
    with pytest.raises(InvariantError, match="takes no child"):
        index.insert(node, range(4), ("a",))


def test_tokens_that_do_not_fit_a_node_are_refused(index):
    root = index.root("")
    with pytest.raises(InvariantError, match="has 4 tokens, not 3"):
        index.insert(root, (1, 2, 3), ("a",))
    with pytest.raises(InvariantError, match="fewer than 4 tokens, not 4"):
        index.insert_tail(root, (1, 2, 3, 4), ("a",))
    assert index.insert_tail(root, (), ("a",)) is None


def test_pins_are_counted_and_cover_the_partial_end(index, pages):
    add(index, range(10), pages=["a", "b", "tail"])
    add(index, range(100, 104), pages=["c"])
    assert index.pin(range(10)) == 10
    assert index.pin(range(10)) == 10
    assert index.pin([7, 7]) == 0
    assert index.stats().pinned_pages == 3
    assert index.flush() == 1
    index.check_invariants()
    assert index.unpin(range(10)) == 10
    assert index.flush() == 0
    assert index.unpin(range(10)) == 10
    assert index.unpin(range(10)) == 0
    assert index.stats().pinned_pages == 0
    assert index.flush() == 3
    index.check_invariants()


def test_a_pinned_tail_hands_its_pin_to_what_replaces_it(index, pages):
    add(index, range(6), pages=["a", "tail"])
    assert index.pin(range(6)) == 6
    add(index, range(7), pages=["a", "longer"])
    add(index, range(8), pages=["a", "full"])
    assert index.stats().pinned_pages == 2
    assert index.flush() == 0
    assert index.match(range(8)).num_tokens == 8
    assert index.unpin(range(6)) == 6
    assert index.flush() == 2
    assert not +pages.refs
    index.check_invariants()


def test_reasons_of_misses_in_order_of_precedence(index):
    add(index, range(12))
    assert index.match(range(12)).miss_reason == ""
    assert index.match([]).miss_reason == ""
    assert index.match(range(20), max_tokens=11).miss_reason == ""
    assert index.match([*range(8), 99]).miss_reason == "shorter_than_page"
    assert index.match([1, 2, 3]).miss_reason == "shorter_than_page"
    assert index.match(range(16)).miss_reason == "never_seen"
    assert index.match([9] * 4).miss_reason == "never_seen"
    assert index.match(range(12), "other").miss_reason == "other_salt"
    assert index.match(range(16), "other").miss_reason == "other_salt"
    assert index.match([9] * 4, "other").miss_reason == "never_seen"
    index.evict(1)
    assert index.match(range(12)).miss_reason == "evicted"
    assert index.match(range(11)).miss_reason == "shorter_than_page"
    assert index.match(range(12), "other").miss_reason == "other_salt"
    add(index, range(12), "other")
    assert index.match(range(12)).miss_reason == "evicted"  # before other_salt
    add(index, range(12))
    index.flush()
    assert index.match(range(12)).miss_reason == "never_seen"  # flushed on purpose


def test_memory_of_evicted_nodes_is_bounded(index, monkeypatch):
    monkeypatch.setattr(vmalloc.prefix_index, "MAX_EVICTED", 2)
    for first in (0, 100, 200):
        add(index, range(first, first + 4))
    index.evict(3)
    reasons = [index.match(range(first, first + 4)).miss_reason for first in (0, 100, 200)]
    assert reasons == ["never_seen", "evicted", "evicted"]


def test_lookups_are_counted_by_reason(index):
    index.note_lookup(10, 4, "never_seen")
    index.note_lookup(10, 10, "")
    stats = index.stats()
    assert (stats.num_lookups, stats.queried_tokens, stats.hit_tokens) == (2, 20, 14)
    assert stats.misses == {**dict.fromkeys(MISS_REASONS, 0), "never_seen": 1}


def test_salts_that_were_only_asked_for_are_forgotten(index):
    add(index, range(4), "used")
    for i in range(5000):
        index.match(range(4), f"salt {i}")
    assert len(index._roots) < 2100
    assert index.match(range(4), "used").num_tokens == 4


def test_entries_of_replaced_tails_do_not_pile_up(pages):
    index = PrefixIndex(lambda k: 10_000 * k, pages.retain, pages.release)
    for length in range(1, 3000):
        index.insert_tail(index.root(""), (0,) * length, (length,))
    assert index.num_nodes == 1
    assert len(index._queue._heap) <= 64


class PrefixIndexMachine(RuleBasedStateMachine):
    """Against a set of prefixes per salt: what is cached, and what may not be evicted."""

    tokens = st.lists(st.integers(0, 1), max_size=16)
    salts = st.sampled_from(["", "x"])

    @initialize(boundary=st.sampled_from(sorted(BOUNDARIES)))
    def start(self, boundary):
        self.boundary = BOUNDARIES[boundary]
        self.pages = Pages()
        self.index = PrefixIndex(self.boundary, self.pages.retain, self.pages.release)
        self.names = itertools.count()
        self.cached = {"": set(), "x": set()}  # every prefix of what was inserted
        self.locked = []  # (node, salt, its tokens)
        self.pinned = []  # (tokens, salt, number pinned)

    @rule(tokens=tokens, salt=salts, tail=st.booleans())
    def insert(self, tokens, salt, tail):
        node = self.index.root(salt)
        while (end := self.boundary(node.depth + 1)) <= len(tokens):
            node = self.index.insert(node, tokens[node.end : end], (next(self.names),))
        if tail:
            self.index.insert_tail(node, tokens[node.end :], (next(self.names), next(self.names)))
        length = len(tokens) if tail else node.end
        self.cached[salt] |= {tuple(tokens[:n]) for n in range(1, length + 1)}

    @rule(tokens=tokens, salt=salts)
    def lock(self, tokens, salt):
        found = self.index.match(tokens, salt)
        self.index.lock(found.path)
        self.locked.append((found.path, salt, tuple(tokens[: found.path.end])))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data):
        entry = data.draw(st.sampled_from(range(len(self.locked))))
        self.index.unlock(self.locked.pop(entry)[0])

    @rule(tokens=tokens, salt=salts)
    def pin(self, tokens, salt):
        num_pinned = self.index.pin(tokens, salt)
        assert num_pinned == self.num_cached(tokens, salt)
        if num_pinned:
            self.pinned.append((tuple(tokens), salt, num_pinned))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        tokens, salt, _ = data.draw(st.sampled_from(self.pinned))
        last = max(i for i, pin in enumerate(self.pinned) if pin[:2] == (tokens, salt))
        assert self.index.unpin(tokens, salt) == self.pinned.pop(last)[2]

    @rule(num_pages=st.integers(0, 6))
    def evict(self, num_pages):
        before = sum((+self.pages.refs).values())
        freed = self.index.evict(num_pages)
        assert before - sum((+self.pages.refs).values()) == freed
        # Short of the goal, only what is locked or pinned may be left.
        assert freed >= num_pages or all(self.is_kept(node) for node in self.index.nodes())
        self.look_again()

    @rule()
    def flush(self):
        self.index.flush()
        assert all(self.is_kept(node) for node in self.index.nodes())
        self.look_again()

    @rule(tokens=tokens, salt=salts, max_tokens=st.none() | st.integers(0, 16))
    def match(self, tokens, salt, max_tokens):
        found = self.index.match(tokens, salt, max_tokens)
        tokens = tokens[:max_tokens]
        assert found.num_tokens == self.num_cached(tokens, salt)
        assert (found.miss_reason == "") == (found.num_tokens == len(tokens))

    def num_cached(self, tokens, salt):
        return max(
            (n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in self.cached[salt]),
            default=0,
        )

    def is_kept(self, node):
        below = [node]
        while below:
            step = below.pop()
            if step.num_locks or step.num_pins:
                return True
            below += step.children.values()
        return False

    def look_again(self):
        """Rebuild the model after an eviction: only what is still cached may be asked for."""
        left = {"": set(), "x": set()}
        for node in self.index.nodes():
            step, tokens = node, ()
            while step.parent is not None:
                tokens = step.tokens + tokens
                step = step.parent
            left[node.salt] |= {tokens[:n] for n in range(1, len(tokens) + 1)}
        assert all(left[salt] <= self.cached[salt] for salt in left)
        self.cached = left

    @invariant()
    def locked_and_pinned_prefixes_are_there(self):
        if not hasattr(self, "index"):
            return
        self.index.check_invariants()
        assert sum((+self.pages.refs).values()) == self.index.stats().cached_pages
        for _, salt, tokens in self.locked:
            assert self.num_cached(tokens, salt) == len(tokens)
        for tokens, salt, num_pinned in self.pinned:
            assert self.num_cached(tokens, salt) >= num_pinned


TestPrefixIndexModel = PrefixIndexMachine.TestCase
TestPrefixIndexModel.__test__ = True

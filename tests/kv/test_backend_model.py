"""Random operations on every KV backend against a model that knows the contents of every row."""

from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmalloc import ConfigError, SequenceGroupSpec, VirtualKVCache, _core, create_kv_backend
from vmalloc.core_setup import make_driver

from .backends import (
    BACKENDS,
    BASES,
    SHAPES,
    Contents,
    books,
    make_config,
    stand_in_driver,
)
from .page_maps import check_page_map

MAX_LEN = 96
MAX_SEQS = 6
SALTS = st.sampled_from(["", "", "", "red", None])
CUTS = st.sampled_from([1, 5, 16, 17, 33, 60, 61, MAX_LEN])


class BackendMachine(RuleBasedStateMachine):
    """Every live row is compared after each rule; it depends on the salt and all tokens before."""

    kind = ""
    is_virtual = False

    @initialize(
        shape=st.sampled_from(sorted(SHAPES)),
        share=st.sampled_from([1.2, 2.0, 4.0]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        commit_ahead=st.sampled_from([0, 3, 20]),
        lookahead=st.sampled_from([0, 0, 9]),
        policy=st.sampled_from(["on_demand", "on_demand", "oracle", "max_length"]),
        spare_slots=st.sampled_from([0, 1, MAX_SEQS]),
        protect=st.booleans(),
    )
    def start(
        self,
        shape,
        share,
        prefix_caching,
        commit_ahead,
        lookahead,
        policy,
        spare_slots,
        protect,
    ):
        name, settings = BACKENDS[self.kind]
        seq_bytes = MAX_LEN * make_config(shape).token_bytes
        config = make_config(
            shape,
            max_num_seqs=MAX_SEQS,
            num_slots=MAX_SEQS + spare_slots,
            lookahead_tokens=lookahead,
            commit_policy=policy if self.is_virtual else "on_demand",
            protect_shared=protect,
            max_seq_len=MAX_LEN,
            capacity_bytes=int(share * seq_bytes) + (24 << 10),
            swap_bytes=seq_bytes,
            high_watermark=0.5 if share > 2 else 1.0,
            low_watermark=0.05,
            prefix_caching=prefix_caching,
            commit_ahead_tokens=commit_ahead,
            **settings,
        )
        if self.kind == "virtual(cuda)":
            self.stand_in = ExitStack()
            self.stand_in.enter_context(stand_in_driver())
        if self.is_virtual:
            self.driver = _core.FaultDriver(make_driver(config))
            self.cache = VirtualKVCache(config, driver=self.driver)
        else:
            self.cache = create_kv_backend(config, name)
        self.contents = Contents(self.cache)
        self.tokens = {}  # of live sequences
        self.salts = {}  # of live and swapped ones
        self.swapped = []  # groups: seq_id -> tokens
        self.is_registered = set()  # sequences that register whatever they write
        self.pins = []
        self.next_id = 0
        self.step = None
        self.admit(1, BASES[0], 33, 2, "", True, True)  # something to work with from the start

    # Coming and going

    @rule(
        count=st.integers(1, 2),
        base=st.sampled_from(BASES),
        cut=CUTS,
        extra=st.integers(0, 20),
        salt=SALTS,
        look_up=st.sampled_from([True, True, False]),
        register=st.sampled_from([True, True, False]),
    )
    def admit(self, count, base, cut, extra, salt, look_up, register):
        tokens = [*base[:cut], *[60 + extra % 3] * extra][:MAX_LEN]
        hit = self.cache.match_prefix(tokens, salt) if look_up and salt is not None else None
        ids = tuple(range(self.next_id, self.next_id + count))
        reservation = self.cache.try_admit(
            SequenceGroupSpec(ids, len(tokens), final_tokens=len(tokens) + 20, cache_salt=salt), hit
        )
        if reservation is None:
            return
        self.next_id += count
        num_cached = reservation.num_cached_tokens
        assert num_cached <= max(len(tokens) - 1, 0)
        assert num_cached <= (hit.num_tokens if hit else 0)
        for seq_id in ids:
            self.tokens[seq_id], self.salts[seq_id] = tokens, salt
            self.contents.check(seq_id, tokens[:num_cached], salt)
            self.contents.write(seq_id, tokens, num_cached, salt)
            if register:
                self.is_registered.add(seq_id)
                self.cache.register_tokens(seq_id, tokens, len(tokens))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keep_prefix=st.sampled_from([True, True, False]))
    def free(self, data, keep_prefix):
        self.free_all(data.draw(self.some_live()), keep_prefix)

    def free_all(self, seq_ids, keep_prefix):
        self.cache.free(seq_ids, keep_prefix)
        for seq_id in seq_ids:
            del self.tokens[seq_id], self.salts[seq_id]

    # Growing, shrinking, sharing

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.sampled_from([0, 1, 2, 3, 7, 16, 40]), token=st.integers(0, 3))
    def extend(self, data, more, token):
        self.grow(data.draw(self.some_live()), more, token)

    @rule(more=st.integers(0, 6), token=st.integers(0, 3))
    def extend_all(self, more, token):
        self.grow(list(self.tokens), more, token)

    def grow(self, seq_ids, more, token):
        after = {
            seq_id: [*self.tokens[seq_id], *[token + seq_id] * more][:MAX_LEN] for seq_id in seq_ids
        }
        if not self.cache.try_extend(seq_ids, [len(tokens) for tokens in after.values()]):
            return
        for seq_id, tokens in after.items():
            first = len(self.tokens[seq_id])
            self.tokens[seq_id] = tokens
            self.contents.write(seq_id, tokens, first, self.salts[seq_id])
            if seq_id in self.is_registered:
                self.cache.register_tokens(seq_id, tokens, len(tokens))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        seq_id = data.draw(self.one_live())
        num_tokens = int(share * len(self.tokens[seq_id]))
        self.cache.truncate(seq_id, num_tokens)
        self.tokens[seq_id] = self.tokens[seq_id][:num_tokens]

    @precondition(lambda self: self.tokens)
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        share=st.sampled_from([None, 0.3, 0.8, 1.0]),
        more=st.integers(0, 3),
    )
    def fork(self, data, count, share, more):
        parent = data.draw(self.one_live())
        tokens = self.tokens[parent]
        num_tokens = None if share is None else int(share * len(tokens))
        children = list(range(self.next_id, self.next_id + count))
        if not self.cache.try_fork(parent, children, num_tokens):
            return
        self.next_id += count
        for child in children:
            self.tokens[child], self.salts[child] = tokens[:num_tokens], self.salts[parent]
        self.grow([parent, *children], more, 0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reorder(self, data):
        first = data.draw(self.one_live())
        beams = [
            seq_id
            for seq_id, tokens in self.tokens.items()
            if len(tokens) == len(self.tokens[first]) and self.salts[seq_id] == self.salts[first]
        ]
        index = st.integers(0, len(beams) - 1)
        parent_idx = data.draw(st.lists(index, min_size=len(beams), max_size=len(beams)))
        if self.cache.try_reorder(beams, parent_idx):
            tokens = [self.tokens[beams[i]] for i in parent_idx]
            self.tokens.update(zip(beams, tokens, strict=True))

    @precondition(lambda self: self.is_virtual and self.tokens and self.step is None)
    @rule(data=st.data(), share=st.sampled_from([0.0, 0.4, 0.9, 1.0, 1.0]), more=st.integers(0, 3))
    def assign(self, data, share, more):
        seq_ids = data.draw(self.some_live())
        count = len(seq_ids)
        source_ids = data.draw(st.lists(self.one_live(), min_size=count, max_size=count))
        num_tokens = int(share * min(len(self.tokens[source]) for source in source_ids))
        slots = [self.cache.slot_of(seq_id) for seq_id in seq_ids]
        if self.cache.try_assign(seq_ids, source_ids, num_tokens):
            old_tokens, old_salts = dict(self.tokens), dict(self.salts)
            for seq_id, source in zip(seq_ids, source_ids, strict=True):
                self.tokens[seq_id] = old_tokens[source][:num_tokens]
                self.salts[seq_id] = old_salts[source]
            # In place, and writable at once: growing moves nobody to another slot either.
            self.grow(seq_ids, more, 1)
            assert slots == [self.cache.slot_of(seq_id) for seq_id in seq_ids]

    @rule(more=st.integers(1, 2))
    def pad(self, more):
        """A padded batch writes to its scratch row; whose row that is, the invariants tell."""
        count = len(self.tokens)
        try:
            view = self.cache.batch_view(list(self.tokens), [0] * count, pad_to=count + more)
        except ConfigError:  # no slot, or no page, is left for it
            return
        table = view.block_table
        place = int(view.cache_batch_idx[count] if table is None else table[count, 0])
        for rows in self.contents.views:
            rows[place, 0] = -1.0

    # Prefixes

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), share=st.sampled_from([0.5, 1.0, 1.0]))
    def register(self, data, share):
        seq_id = data.draw(self.one_live())
        tokens = self.tokens[seq_id]
        self.cache.register_tokens(seq_id, tokens, int(share * len(tokens)))

    @rule(base=st.sampled_from(BASES), cut=CUTS, salt=st.sampled_from(["", "red"]))
    def pin(self, base, cut, salt):
        num_pinned = self.cache.pin_prefix(base[:cut], salt)
        if num_pinned:
            self.pins.append((base[:cut], salt, num_pinned))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        tokens, salt, _ = data.draw(st.sampled_from(self.pins))
        last = max(i for i, pin in enumerate(self.pins) if pin[:2] == (tokens, salt))
        assert self.cache.unpin_prefix(tokens, salt) == self.pins.pop(last)[2]

    @rule()
    def flush(self):
        self.cache.flush_prefixes()

    @rule(base=st.sampled_from(BASES), cut=CUTS)
    def come_and_go(self, base, cut):
        """A short life between two rules: most prefixes are left by ended sequences."""
        self.admit(1, base, cut, 0, "", True, True)
        if self.next_id - 1 in self.tokens:
            self.free_all([self.next_id - 1], keep_prefix=True)

    # Host memory

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def swap_out(self, data):
        seq_ids = data.draw(self.some_live())
        if self.cache.try_swap_out(seq_ids):
            self.swapped.append({seq_id: self.tokens.pop(seq_id) for seq_id in seq_ids})

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        group = data.draw(st.sampled_from(self.swapped))
        if self.cache.try_swap_in(data.draw(st.permutations(list(group)))):
            self.swapped = [other for other in self.swapped if other is not group]
            self.tokens.update(group)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def free_swapped(self, data):
        group = data.draw(st.sampled_from(self.swapped))
        seq_id = data.draw(st.sampled_from(sorted(group)))
        self.cache.free([seq_id])
        del group[seq_id], self.salts[seq_id]
        self.swapped = [other for other in self.swapped if other]

    @rule()
    def sleep(self):
        before = books(self.cache)
        if self.step is not None:
            with pytest.raises(ConfigError, match="still open"):
                self.cache.try_sleep()
            return
        if not self.cache.try_sleep():
            assert books(self.cache) == before
            return
        self.is_all_given_back()
        with pytest.raises(ConfigError, match="asleep"):
            self.cache.flush_prefixes()
        if not self.cache.try_wake():
            self.is_all_given_back()
            # Pages that a kernel may still read are in the way until it is done.
            self.driver.hold_fences(False)
            self.driver.fail_call(0, _core.Fault.NONE)
            assert self.cache.try_wake()

    def is_all_given_back(self):
        stats = self.cache.stats()
        num_pinned = self.cache.prefix_stats().pinned_pages if self.is_virtual else 0
        assert stats.created_pages <= stats.retired_pages + num_pinned
        assert stats.swapped_bytes <= self.cache.config.swap_bytes
        check_page_map(self.cache.page_map(), stats)

    # Capacity and steps

    @rule(num_tokens=st.integers(1, MAX_LEN))
    def prefetch(self, num_tokens):
        self.cache.prefetch(num_tokens)

    @rule(keep=st.integers(0, 5))
    def trim(self, keep):
        self.cache.trim(keep)

    @rule(share=st.sampled_from([0.5, 0.8, 1.0]))
    def resize(self, share):
        self.cache.resize(int(self.cache.config.capacity_bytes * share))

    @precondition(lambda self: self.step is None)
    @rule()
    def begin_step(self):
        self.step = self.cache.begin_step()

    @precondition(lambda self: self.step is not None)
    @rule()
    def end_step(self):
        self.cache.end_step(self.step)
        self.step = None

    @precondition(lambda self: self.is_virtual)
    @rule(hold=st.booleans())
    def hold_fences(self, hold):
        self.driver.hold_fences(hold)

    # With a worker, whom it strikes would depend on time.
    @precondition(lambda self: self.is_virtual and not self.cache.config.commit_ahead_tokens)
    @rule(call=st.integers(0, 3))
    def run_out(self, call):
        """The machine has no page, or no mapping, for one of the next calls."""
        self.driver.fail_call(call, _core.Fault.OUT_OF_MEMORY)

    @precondition(lambda self: self.is_virtual)
    @rule()
    def wait_worker(self):
        self.cache.wait_worker()

    # What always holds

    @invariant()
    def books_balance(self):
        if not hasattr(self, "cache"):
            return
        if self.is_virtual:
            self.cache.wait_worker()  # what succeeds must not depend on its pace
        self.cache.check_invariants()
        stats = self.cache.stats()
        assert stats.num_live_seqs == len(self.tokens)
        num_tokens = sum(map(len, self.tokens.values()))
        assert stats.logical_bytes == self.cache.config.token_bytes * num_tokens
        assert stats.live_bytes <= min(stats.logical_bytes, stats.committed_bytes)
        assert (
            stats.in_use_pages * stats.page_bytes
            == stats.committed_bytes + stats.ahead_bytes + stats.parked_bytes + stats.cached_bytes
        )
        assert stats.created_pages == stats.free_pages + stats.in_use_pages + stats.retired_pages
        assert stats.committed_bytes <= stats.peak_committed_bytes
        assert stats.live_bytes <= stats.peak_live_bytes
        assert stats.num_live_seqs <= stats.peak_live_seqs <= MAX_SEQS
        assert stats.swapped_bytes <= self.cache.config.swap_bytes
        check_page_map(self.cache.page_map(), stats)
        for tokens, salt, num_pinned in self.pins:
            assert self.cache.match_prefix(tokens, salt).num_tokens >= num_pinned

    @invariant()
    def every_row_is_as_written(self):
        if not hasattr(self, "cache"):
            return
        for seq_id, tokens in self.tokens.items():
            self.contents.check(seq_id, tokens, self.salts[seq_id])

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        if self.is_virtual:
            self.driver.hold_fences(False)
        self.cache.close()
        if self.is_virtual:
            counters = self.driver.counters()
            assert counters["create_calls"] == counters["destroy_calls"]

        if self.kind == "virtual(cuda)":
            del self.cache, self.contents, self.driver
            self.stand_in.close()

    def one_live(self):
        return st.sampled_from(sorted(self.tokens))

    def some_live(self):
        return st.lists(self.one_live(), min_size=1, max_size=3, unique=True)


def machine_for(kind):
    attributes = {"kind": kind, "is_virtual": BACKENDS[kind][0] == "virtual"}
    machine = type(f"{title(kind)}Machine", (BackendMachine,), attributes)
    machine.TestCase.__test__ = True
    return machine.TestCase


def title(kind):
    """``"paged(torch)"`` -> ``"PagedTorch"``."""
    return "".join(filter(str.isalpha, kind.title()))


for _kind in BACKENDS:
    globals()[f"Test{title(_kind)}Model"] = machine_for(_kind)

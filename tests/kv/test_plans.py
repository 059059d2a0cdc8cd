"""A cache that repeats a plan holds the same, page for page, as the one that made it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from tests.kv.planned import Pair
from vmalloc import KVCacheConfig, LayerKVSpec, _core
from vmalloc.backend import SequenceGroupSpec
from vmalloc.errors import ConfigError, DriverError, InvariantError
from vmalloc.plans import decode_plan, encode_plan, take_ledger
from vmalloc.plans.operations import Extend, Free

KINDS = ("virtual", "paged")


def make_config(**changes: object) -> KVCacheConfig:
    layer = LayerKVSpec(num_kv_heads=1, k_head_dim=40, v_head_dim=40)
    settings: dict[str, object] = {
        "layers": (layer,) * 3,
        "max_num_seqs": 12,
        "max_seq_len": 128,
        "capacity_bytes": 120 * 4096,
        "page_bytes": 4096,
        "layers_per_group": 2,
        "block_size": 8,
        "prefix_caching": True,
        "swap_bytes": 40 * 4096,
        "commit_ahead_tokens": 4,
    }
    settings.update(changes)
    return KVCacheConfig(**settings)  # type: ignore[arg-type]


CALLS = ("admit", "extend", "extend", "fork", "reorder", "free", "swap_out", "swap_in", "truncate")


class Load:
    """Random calls as an engine makes them, with few distinct prompts so that prefixes are hit."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.random = random.Random(seed)
        self.tokens: dict[int, list[int]] = {}
        self.swapped: dict[int, list[int]] = {}
        self.next_id = 0
        self.counts: dict[str, int] = {}

    def step(self, calls: Sequence[str] = CALLS, num_calls: int | None = None) -> None:
        """A few calls, and a step that computes what they made room for."""
        cache = self.pair.leader
        for _ in range(num_calls or self.random.randrange(1, 5)):
            name = self.random.choice(calls)
            if getattr(self, name)():
                self.counts[name] = self.counts.get(name, 0) + 1
        cache.end_step(cache.begin_step())

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def some(self) -> int | None:
        return self.random.choice(list(self.tokens)) if self.tokens else None

    def admit(self) -> bool:
        cache, seq_id = self.pair.leader, self.new_id()
        prompt = [self.random.randrange(3)] * self.random.choice([8, 24, 40, 61])
        prompt += [self.random.randrange(2)] * self.random.randrange(1, 20)
        salt = self.random.choice(["", "", "a", None])
        hit = None if salt is None else cache.match_prefix(prompt, salt)
        spec = SequenceGroupSpec((seq_id,), len(prompt), cache_salt=salt)
        if cache.try_admit(spec, hit) is None:
            return False
        self.tokens[seq_id] = prompt
        cache.register_tokens(seq_id, prompt, len(prompt))
        return True

    def extend(self) -> bool:
        chosen = [seq_id for seq_id in self.tokens if self.random.random() < 0.7]
        chosen = [seq_id for seq_id in chosen if len(self.tokens[seq_id]) < 120]
        for seq_id in chosen:
            self.tokens[seq_id] = [*self.tokens[seq_id]]
        grown = {
            seq_id: [self.random.randrange(3) for _ in range(self.random.randrange(1, 9))]
            for seq_id in chosen
        }
        totals = [len(self.tokens[seq_id]) + len(grown[seq_id]) for seq_id in chosen]
        if not self.pair.leader.try_extend(chosen, totals):
            return False
        for seq_id, total in zip(chosen, totals, strict=True):
            self.tokens[seq_id] += grown[seq_id]
            self.pair.leader.register_tokens(seq_id, self.tokens[seq_id], total)
        return True

    def fork(self) -> bool:
        parent = self.some()
        if parent is None or len(self.tokens) > 8:
            return False
        children = [self.new_id() for _ in range(self.random.randrange(1, 3))]
        length = self.random.choice([None, max(1, len(self.tokens[parent]) - 5)])
        if not self.pair.leader.try_fork(parent, children, length):
            return False
        for child in children:
            self.tokens[child] = self.tokens[parent][:length]
        return True

    def reorder(self) -> bool:
        seq_id = self.some()
        if seq_id is None:
            return False
        length = len(self.tokens[seq_id])
        beams = [other for other in self.tokens if len(self.tokens[other]) == length]
        parents = [self.random.randrange(len(beams)) for _ in beams]
        if not self.pair.leader.try_reorder(beams, parents):
            return False
        old = [self.tokens[beam] for beam in beams]
        self.tokens.update({beam: old[idx] for beam, idx in zip(beams, parents, strict=True)})
        return True

    def free(self) -> bool:
        seq_id = self.some()
        if seq_id is None:
            return False
        self.pair.leader.free([seq_id], keep_prefix=self.random.random() < 0.8)
        del self.tokens[seq_id]
        return True

    def swap_out(self) -> bool:
        seq_id = self.some()
        if seq_id is None or not self.pair.leader.try_swap_out([seq_id]):
            return False
        self.swapped[seq_id] = self.tokens.pop(seq_id)
        return True

    def swap_in(self) -> bool:
        if not self.swapped:
            return False
        seq_id = self.random.choice(list(self.swapped))
        if not self.pair.leader.try_swap_in([seq_id]):
            return False
        self.tokens[seq_id] = self.swapped.pop(seq_id)
        return True

    def truncate(self) -> bool:
        seq_id = self.some()
        if seq_id is None:
            return False
        length = self.random.randrange(1, len(self.tokens[seq_id]) + 1)
        self.pair.leader.truncate(seq_id, length)
        self.tokens[seq_id] = self.tokens[seq_id][:length]
        return True


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(make_config(), request.param)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_are_repeated_page_for_page(pair: Pair, seed: int) -> None:
    load = Load(pair, seed)
    for number in range(150):
        load.step()
        if number % 3 != 1:  # plans of one step, and of two
            pair.tell()
            pair.check()
    assert set(load.counts) == set(CALLS)
    stats, prefixes = pair.leader.stats(), pair.leader.prefix_stats()
    assert min(stats.aliased_pages, stats.cow_copies, stats.swap_in_pages) > 0
    assert min(prefixes.evicted_pages, prefixes.hit_tokens) > 0


@pytest.mark.parametrize("other_limit", [None, 700])
def test_many_sequences_over_the_null_driver(other_limit: int | None) -> None:
    """Hundreds of them, in caches that only count; with a rank that runs out, and without."""
    config = make_config(
        driver="null",
        max_num_seqs=300,
        capacity_bytes=2000 * 4096,
        commit_ahead_tokens=2,
        swap_bytes=500 * 4096,
    )
    pair = Pair(config, "virtual", other_limit)
    load = Load(pair, 11)
    for _ in range(250):
        load.step(("admit", "admit", "admit", *CALLS), num_calls=12)
        pair.tell()
    pair.check()
    assert pair.leader.stats().peak_live_seqs > (50 if other_limit else 100)
    assert pair.leader.prefix_stats().hit_tokens > 0
    assert (pair.num_refused > 0) == (other_limit is not None)
    pair.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_with_less_memory_makes_the_decider_run_out(seed: int) -> None:
    pair = Pair(make_config(), "virtual", other_limit=50)
    load = Load(pair, seed)
    most = 0
    for _ in range(120):
        load.step()
        pair.tell()
        pair.check()
        most = max(most, pair.other.stats().created_pages)
    assert pair.num_refused > 0
    assert most <= 50
    # What the decider had created for a grant that the other refused is given back.
    assert pair.leader.stats().created_pages <= 50
    pair.close()


def test_a_cache_that_does_not_find_its_pages_says_so() -> None:
    pair = Pair(make_config(), "virtual")
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 40)) is not None
    pair.tell()
    assert pair.leader.try_extend([1], [120])
    plan = pair.leader.take_plan()
    supply = pair.other.supply  # type: ignore[attr-defined]
    supply.end_grant(0, keeps_pages=True)
    pair.other.trim()
    with pytest.raises(InvariantError, match="pages short where the one that decides was not"):
        pair.executor.carry_out(plan)
    pair.executor.drop_everything(pair.leader.stats().capacity_bytes)
    pair.other.check_invariants()
    assert pair.other.stats().num_live_seqs == 0
    pair.close()


def leave_prefix(pair: Pair, seq_id: int, prompt: list[int]) -> None:
    cache = pair.leader
    assert cache.try_admit(SequenceGroupSpec((seq_id,), len(prompt)), cache.match_prefix(prompt))
    cache.register_tokens(seq_id, prompt, len(prompt))
    cache.free([seq_id])


def test_a_hit_that_found_no_room_was_used_everywhere() -> None:
    """What is evicted next must not depend on a rank having seen the attempt."""
    pair, prompts = Pair(make_config(), "virtual"), [[1] * 60, [2] * 60]
    cache = pair.leader
    for seq_id, prompt in enumerate(prompts):
        leave_prefix(pair, seq_id, prompt)
    many = SequenceGroupSpec(tuple(range(10, 18)), 120)
    assert cache.try_admit(many, cache.match_prefix([*prompts[0], 3])) is None
    seq_id = 20
    while cache.prefix_stats().evicted_pages == 0:
        assert cache.try_admit(SequenceGroupSpec((seq_id,), 60)) is not None
        seq_id += 1
    assert cache.match_prefix(prompts[0]).num_tokens == 60  # the other prompt's pages went
    pair.tell()
    pair.check()
    pair.close()


def test_a_hit_found_before_there_was_more(pair: Pair) -> None:
    prompt = [1] * 60
    leave_prefix(pair, 1, prompt[:24])
    hit = pair.leader.match_prefix(prompt)
    leave_prefix(pair, 2, prompt)
    reservation = pair.leader.try_admit(SequenceGroupSpec((3,), 60), hit)
    assert reservation is not None
    assert reservation.num_cached_tokens == 59
    pair.tell()
    pair.check()


def test_a_swap_that_only_the_decider_cannot_make() -> None:
    pair = Pair(make_config(commit_ahead_tokens=0), "virtual")
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 60)) is not None
    pair.tell()
    pair.drivers[1].fail_call(0, _core.Fault.OUT_OF_MEMORY)
    assert not pair.leader.try_swap_out([1])
    pair.tell()
    pair.check()
    pair.close()


def test_pages_that_a_lower_cap_took_are_granted_anew() -> None:
    pair = Pair(make_config(), "virtual")
    cache = pair.leader
    assert cache.try_admit(SequenceGroupSpec((1, 2, 3), 120)) is not None
    cache.resize(40 * 4096)  # below what is in use
    cache.free([1, 2, 3], keep_prefix=False)
    pair.tell()
    assert cache.stats().created_pages == 40
    cache.resize(120 * 4096)
    pair.check()
    num_granted = pair.granted
    assert cache.try_admit(SequenceGroupSpec((4, 5), 120)) is not None
    assert pair.granted > num_granted
    pair.tell()
    pair.check()
    pair.close()


def test_a_rank_gives_up_what_others_do_not_have() -> None:
    pair = Pair(make_config(), "virtual")
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 60)) is not None
    supply = pair.leader_cache.supply  # type: ignore[attr-defined]
    assert supply.try_grant(pair.granted + 10)
    supply.end_grant(pair.granted + 10, keeps_pages=True)
    pair.trim(1000)
    pair.check()
    pair.close()


def test_a_pin_and_a_cap_that_a_rank_was_not_told(pair: Pair) -> None:
    """It failed before it got to them."""
    cache, prompts = pair.leader, [[1] * 40, [2] * 40]
    for seq_id, prompt in enumerate(prompts):
        leave_prefix(pair, seq_id, prompt)
    assert cache.pin_prefix(prompts[0]) == 40
    pair.tell()
    assert cache.pin_prefix(prompts[1]) == 40
    assert cache.unpin_prefix(prompts[0]) == 40
    pair.lose_plan()
    cache.resize(90 * 4096)
    pair.start_over()
    pair.check()
    assert pair.other.stats().capacity_bytes == cache.stats().capacity_bytes < 120 * 4096
    assert cache.unpin_prefix(prompts[1]) == 0
    leave_prefix(pair, 7, prompts[1])
    pair.tell()
    pair.check()


def test_another_outcome_is_an_error() -> None:
    pair = Pair(make_config(), "paged")
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 8)) is not None
    pair.tell()
    with pytest.raises(InvariantError, match="Extend came to True on this rank and to False"):
        pair.executor.carry_out([Extend([1], [9], is_done=False, notes=[])])
    pair.close()


def test_a_call_that_throws_breaks_the_plan() -> None:
    pair = Pair(make_config(), "virtual")
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 8)) is not None
    pair.drivers[1].fail_call(0, _core.Fault.ERROR)
    assert not pair.leader.is_broken
    with pytest.raises(DriverError):
        pair.leader.try_extend([1], [100])
    assert pair.leader.is_broken
    pair.leader.forget_everything()
    assert not pair.leader.is_broken
    assert not pair.leader.has_plan
    pair.close()


def test_a_call_that_is_refused_breaks_nothing(pair: Pair) -> None:
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 8)) is not None
    for refused in (
        lambda: pair.leader.resize(1),
        lambda: pair.leader.free([1, 2]),
        lambda: pair.leader.try_extend([1], [1000]),
        lambda: pair.leader.try_fork(2, [3]),
        lambda: pair.leader.try_reorder([1, 2], [0, 0]),
        lambda: pair.leader.try_swap_in([1]),
        lambda: pair.leader.register_tokens(1, [1], 5),
        lambda: pair.leader.truncate(2, 1),
        lambda: pair.leader.try_admit(SequenceGroupSpec((1,), 8)),
    ):
        with pytest.raises(ConfigError):
            refused()
    assert not pair.leader.is_broken
    pair.tell()
    pair.check()


@pytest.mark.parametrize(
    "message",
    [b"", b"\x80", b"[1]", msgspec.msgpack.encode([["extend", [1], ["x"], True, []]]),
     msgspec.msgpack.encode([["exec", "rm"]]), encode_plan([Free([1], True)])[:-1]],
)  # fmt: skip
def test_what_is_no_plan_is_refused(message: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_plan(message)


def test_ledgers_tell_what_differs(pair: Pair) -> None:
    assert pair.leader.try_admit(SequenceGroupSpec((1,), 30)) is not None
    mine = take_ledger(pair.leader_cache)
    (other,) = (take_ledger(pair.other),)
    assert any("sequences: " in line for line in mine.differences(other))
    assert type(mine).decode(mine.encode()) == mine
    pair.tell()
    pair.check()

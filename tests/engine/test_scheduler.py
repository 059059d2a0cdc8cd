"""The scheduler alone, over a backend that only counts pages."""

from __future__ import annotations

import ast
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmalloc.backend import Reservation, SequenceGroupSpec, Step
from vmalloc.engine.admission import WaitingGroups
from vmalloc.engine.preemption import choose_victim
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.schedule import ScheduledBatch
from vmalloc.engine.scheduler import MAX_STALLS, Scheduler
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.sequence_group import GroupStatus, SequenceGroup

ENGINE = Path(__file__).parents[2] / "engine"


class CountingBackend:
    """Counts pages of ``page_tokens`` rows; freed ones come back at the end of a step."""

    name = "counting"

    def __init__(
        self, num_pages: int, page_tokens: int = 4, max_seq_len: int = 1000, retires: bool = False
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.retires = retires
        self.free_pages = num_pages
        self.retired_pages = 0
        self.rows: dict[int, int] = {}
        self.prefetched: list[int] = []
        self.is_broken = False
        self.config: Any = SimpleNamespace(
            layers=(None,),
            layers_per_group=None,
            max_seq_len=max_seq_len,
            prefix_caching=False,
            swap_bytes=0,
            token_bytes=1,
        )

    def pages(self, rows: int) -> int:
        return -(-rows // self.page_tokens)

    def max_seq_tokens(self) -> int:
        return min(self.num_pages * self.page_tokens, int(self.config.max_seq_len))

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        return self.pages(num_tokens) <= self.free_pages

    def prefetch(self, num_tokens: int) -> None:
        self.prefetched.append(num_tokens)

    def try_admit(self, group: SequenceGroupSpec, hit: Any = None) -> Reservation | None:
        need = self.pages(group.num_tokens) * len(group.seq_ids)
        if self.is_broken or need > self.free_pages:
            return None
        self.free_pages -= need
        for seq_id in group.seq_ids:
            assert seq_id not in self.rows
            self.rows[seq_id] = group.num_tokens
        return Reservation(group.seq_ids, ())

    def try_extend(self, seq_ids: list[int], num_tokens: list[int]) -> bool:
        pairs = list(zip(seq_ids, num_tokens, strict=True))
        assert all(total >= self.rows[seq_id] for seq_id, total in pairs)
        need = sum(self.pages(total) - self.pages(self.rows[seq_id]) for seq_id, total in pairs)
        if self.is_broken or need > self.free_pages:
            return False
        self.free_pages -= need
        self.rows.update(pairs)
        return True

    def free(self, seq_ids: list[int], keep_prefix: bool = True) -> None:
        pages = sum(self.pages(self.rows.pop(seq_id)) for seq_id in seq_ids)
        if self.retires:
            self.retired_pages += pages
        else:
            self.free_pages += pages

    def begin_step(self, stream: int | None = None) -> Step:
        return Step(0)

    def end_step(self, step: Step) -> None:
        self.free_pages += self.retired_pages
        self.retired_pages = 0

    def trim(self, keep_free_pages: int = 0) -> int:
        return 0

    def stats(self) -> Any:
        return SimpleNamespace(
            capacity_bytes=self.num_pages * self.page_tokens,
            page_bytes=self.page_tokens,
            created_pages=self.num_pages,
            free_pages=self.free_pages,
            retired_pages=self.retired_pages,
            ahead_bytes=0,
            parked_bytes=0,
            cached_bytes=0,
        )


def make_group(idx: int, num_prompt: int, max_tokens: int) -> SequenceGroup:
    root = Sequence(idx, str(idx), [idx] * num_prompt, SamplingParams(), max_tokens=max_tokens)
    return SequenceGroup(root, arrival_idx=idx)


def make_scheduler(backend: CountingBackend, seqs: int = 8, tokens: int = 32) -> Scheduler:
    return Scheduler(backend, max_num_seqs=seqs, max_num_batched_tokens=tokens)  # type: ignore[arg-type]


def run_step(scheduler: Scheduler, backend: CountingBackend) -> ScheduledBatch:
    """Schedule, "compute" and append a token where the end was reached; finish who is done."""
    batch = scheduler.schedule()
    for seq, num_new in zip(batch.seqs, batch.num_new_tokens, strict=True):
        assert backend.rows[seq.seq_id] == seq.num_computed_tokens + num_new
    step = backend.begin_step()
    backend.end_step(step)
    scheduler.complete(batch)
    ended = []
    for part in batch.groups:
        seq = part.group.root
        if seq.num_uncomputed_tokens == 0:
            seq.token_ids.append(0)
            if seq.num_output_tokens >= seq.max_tokens:
                part.group.finish("length")
                ended.append(part.group)
    scheduler.release(ended)
    return batch


def run_all(scheduler: Scheduler, backend: CountingBackend, max_steps: int = 5000) -> int:
    for num_steps in range(max_steps):
        if not scheduler.has_unfinished:
            return num_steps
        run_step(scheduler, backend)
    raise AssertionError(f"not done after {max_steps} steps")


def test_scheduler_imports_no_torch() -> None:
    for name in (
        *("scheduler.py", "schedule.py", "admission.py", "preemption.py", "preemption_cost.py"),
        *("group_memory.py", "sequence_group.py", "sequence.py"),
        *("outputs.py", "sampling_params.py", "config.py"),
    ):
        tree = ast.parse((ENGINE / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        nodes = list(ast.walk(tree))
        names = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "transformers")}


def test_decodes_and_a_prefill_chunk_share_a_step() -> None:
    backend = CountingBackend(100)
    scheduler = make_scheduler(backend, tokens=10)
    scheduler.add(make_group(0, 4, 8))
    run_step(scheduler, backend)
    scheduler.add(make_group(1, 25, 8))
    batches = [run_step(scheduler, backend) for _ in range(4)]
    assert [batch.num_new_tokens for batch in batches] == [[1, 9], [1, 9], [1, 7], [1, 1]]


def test_first_come_is_first_served_and_seats_are_limited() -> None:
    backend = CountingBackend(100)
    scheduler = make_scheduler(backend, seqs=2)
    for seq_id in range(4):
        scheduler.add(make_group(seq_id, 3, 5))
    batch = run_step(scheduler, backend)
    assert [seq.seq_id for seq in batch.seqs] == [0, 1]
    assert [group.root.seq_id for group in scheduler.waiting] == [2, 3]


def test_a_full_pool_preempts_the_latest_arrival_and_finishes_everyone() -> None:
    backend = CountingBackend(num_pages=10)
    scheduler = make_scheduler(backend)
    groups = [make_group(idx, 6, 20) for idx in range(4)]
    for group in groups:
        scheduler.add(group)
    run_all(scheduler, backend)
    assert scheduler.num_preemptions > 0
    assert groups[0].metrics.num_preemptions == 0
    assert groups[3].metrics.num_preemptions > 0
    assert all(group.root.finish_reason == "length" for group in groups)
    assert all(group.root.num_output_tokens == 20 for group in groups)
    assert backend.free_pages == backend.num_pages


def test_a_preempted_sequence_goes_to_the_front_and_is_prefilled_again() -> None:
    backend = CountingBackend(num_pages=4)
    scheduler = make_scheduler(backend)
    first, second, third = make_group(0, 6, 9), make_group(1, 6, 9), make_group(2, 6, 9)
    for seq in (first, second, third):
        scheduler.add(seq)
    while not scheduler.num_preemptions:
        run_step(scheduler, backend)
    assert second.status is GroupStatus.WAITING
    assert second.root.num_computed_tokens == 0
    assert second.root.num_output_tokens > 0
    assert list(scheduler.waiting) == [second, third]
    run_all(scheduler, backend)
    assert [seq.root.num_output_tokens for seq in (first, second, third)] == [9, 9, 9]


def test_a_prompt_that_can_never_fit_fails_alone() -> None:
    backend = CountingBackend(num_pages=3)
    scheduler = make_scheduler(backend)
    good, bad, last = make_group(0, 4, 4), make_group(1, 12, 4), make_group(2, 4, 4)
    for seq in (good, bad, last):
        scheduler.add(seq)
    run_all(scheduler, backend)
    assert bad.root.finish_reason == "error"
    assert "12 tokens" in (bad.error or "")
    assert "12 of one sequence" in (bad.error or "")
    assert good.root.finish_reason == last.root.finish_reason == "length"


def test_a_prompt_that_fills_the_pool_may_still_write_one_token() -> None:
    backend = CountingBackend(num_pages=3)
    scheduler = make_scheduler(backend)
    seq = make_group(0, 12, 1)
    scheduler.add(seq)
    run_all(scheduler, backend)
    assert seq.root.finish_reason == "length"


def test_a_sequence_that_outgrows_the_pool_alone_ends_with_an_error() -> None:
    backend = CountingBackend(num_pages=3)
    scheduler = make_scheduler(backend)
    big, small = make_group(0, 6, 100), make_group(1, 2, 2)
    scheduler.add(big)
    scheduler.add(small)
    run_all(scheduler, backend)
    assert big.root.finish_reason == "error"
    assert big.root.num_output_tokens == 12 - 6 + 1
    assert small.root.finish_reason == "length"
    assert backend.free_pages == 3


def test_retiring_pages_are_waited_for_before_anyone_is_preempted() -> None:
    backend = CountingBackend(num_pages=6, retires=True)
    scheduler = make_scheduler(backend)
    old, young, youngest = make_group(0, 8, 2), make_group(1, 8, 4), make_group(2, 8, 4)
    for seq in (old, young, youngest):
        scheduler.add(seq)
    run_step(scheduler, backend)  # all prefilled: 6 pages
    scheduler.release([_ended(old)])  # its pages come back at the end of the next step
    assert run_step(scheduler, backend).seqs == []
    assert run_step(scheduler, backend).seqs == [young.root, youngest.root]
    run_all(scheduler, backend)
    assert scheduler.num_preemptions == 0


def _ended(group: SequenceGroup) -> SequenceGroup:
    group.finish("abort")
    return group


@pytest.mark.parametrize("is_running", [False, True])
def test_a_backend_that_never_gives_pages_fails_the_request_and_returns(is_running: bool) -> None:
    backend = CountingBackend(num_pages=50)
    scheduler = make_scheduler(backend)
    seq = make_group(0, 4, 20)
    scheduler.add(seq)
    if is_running:
        run_step(scheduler, backend)
    backend.is_broken = True
    assert run_all(scheduler, backend, max_steps=2 * MAX_STALLS + 10) >= MAX_STALLS
    assert seq.root.finish_reason == "error"


def test_aborting_takes_a_sequence_off_either_queue() -> None:
    backend = CountingBackend(num_pages=50)
    scheduler = make_scheduler(backend, seqs=1)
    running, waiting = make_group(0, 4, 9), make_group(1, 4, 9)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler, backend)
    scheduler.release([_ended(waiting)])
    assert list(scheduler.waiting) == []
    scheduler.release([_ended(running)])
    assert not scheduler.has_unfinished
    assert backend.free_pages == 50


def test_waiting_requests_are_announced_to_the_backend() -> None:
    backend = CountingBackend(num_pages=50)
    scheduler = make_scheduler(backend, seqs=1)
    for seq_id in range(3):
        scheduler.add(make_group(seq_id, 5 + seq_id, 9))
    assert backend.prefetched == [5]
    run_step(scheduler, backend)
    assert backend.prefetched == [5, 6]


def test_the_last_that_made_progress_gives_way_but_never_the_first_for_another() -> None:
    rng = random.Random(0)
    for _ in range(200):
        groups = [make_group(idx, 1, 1) for idx in range(rng.randint(1, 4))]
        for group in groups:
            group.is_shielded = rng.random() < 0.5
        rng.shuffle(groups)
        by_rank = sorted(groups, key=lambda group: group.rank)
        free = [group for group in by_rank[1:] if not group.is_shielded]
        assert choose_victim(groups) is (free or by_rank)[-1]


def test_whoever_waits_stands_in_the_order_of_rank() -> None:
    rng = random.Random(0)
    queue = WaitingGroups("priority")
    groups = [make_group(idx, 1, 1) for idx in range(60)]
    for idx, group in enumerate(groups):
        group.priority = rng.randint(-2, 2)
        queue.rank(group, idx)
        if rng.random() < 0.2:
            group.status = GroupStatus.SWAPPED
        queue.add(group)
    expected = sorted(groups, key=lambda group: group.rank)
    assert [*queue.waiting] == [one for one in expected if one.status is GroupStatus.WAITING]
    assert queue.swapped == [one for one in expected if one.status is GroupStatus.SWAPPED]
    assert list(queue.candidates(60)) == expected
    assert set(queue.candidates(5)) == {*queue.swapped[:5], *list(queue.waiting)[:5]}


@pytest.mark.parametrize("count", [1, 5])
def test_whoever_decodes_stands_before_whoever_prefills(count: int) -> None:
    backend = CountingBackend(100)
    scheduler = make_scheduler(backend, tokens=12)
    late = [make_group(idx, 20, 8) for idx in range(count)]
    scheduler.add(make_group(100, 9, 8))
    scheduler.add(late[0])
    run_step(scheduler, backend)  # the first one, and a chunk of the next
    scheduler.add(make_group(101, 1, 8))
    for group in late[1:]:
        scheduler.add(group)
    while scheduler.has_unfinished:
        batch = run_step(scheduler, backend)
        assert batch.num_new_tokens[: batch.num_decodes] == [1] * batch.num_decodes
        parts = [seq for part in batch.groups for seq in part.seqs]
        assert parts == batch.seqs
        assert all(seq.num_output_tokens > 1 for seq in batch.seqs[: batch.num_decodes])


@pytest.mark.parametrize("retires", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_random_traffic_always_ends(seed: int, retires: bool) -> None:
    rng = random.Random(seed)
    backend = CountingBackend(rng.randint(2, 20), rng.randint(1, 5), retires=retires)
    seats = rng.randint(1, 8)
    scheduler = make_scheduler(backend, seats, rng.randint(seats, 24))
    seqs = [make_group(idx, rng.randint(1, 30), rng.randint(1, 30)) for idx in range(20)]
    arrivals = iter(seqs)
    live: list[SequenceGroup] = []
    for _ in range(200):
        if rng.random() < 0.3 and (seq := next(arrivals, None)) is not None:
            scheduler.add(seq)
            live.append(seq)
        if live and rng.random() < 0.02:
            victim = live.pop(rng.randrange(len(live)))
            if not victim.is_finished:
                scheduler.release([_ended(victim)])
        run_step(scheduler, backend)
    for seq in arrivals:
        scheduler.add(seq)
    run_all(scheduler, backend)
    backend.end_step(backend.begin_step())
    assert backend.free_pages == backend.num_pages
    limit = backend.max_seq_tokens()
    for seq in seqs:
        assert seq.is_finished
        fits = seq.root.num_prompt_tokens + seq.root.max_tokens - 1 <= limit
        assert seq.root.finish_reason in (("length", "abort") if fits else ("error", "abort"))

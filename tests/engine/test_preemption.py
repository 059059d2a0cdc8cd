"""Who gives up memory and how: the parts that know of no memory."""

from __future__ import annotations

import pytest

from vmalloc.engine.admission import AGING_STEPS, WaitingGroups
from vmalloc.engine.preemption import choose_victim
from vmalloc.engine.preemption_cost import PreemptionCost
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.sequence_group import GroupStatus, SequenceGroup, common_prefix


def group(idx: int, priority: int = 0) -> SequenceGroup:
    root = Sequence(idx, str(idx), [1, 2, 3], SamplingParams(), max_tokens=4)
    return SequenceGroup(root, arrival_idx=idx, priority=priority)


class TestCost:
    def test_the_first_measurement_counts_whole_and_later_ones_smoothly(self) -> None:
        cost = PreemptionCost()
        cost.observe_prefill(100, 1.0)
        assert cost.prefill_seconds == pytest.approx(0.01)
        cost.observe_prefill(100, 2.0)
        assert cost.prefill_seconds == pytest.approx(0.012)
        cost.observe_swap(1000, 0.5)
        assert cost.swap_bandwidth == pytest.approx(2000)
        cost.observe_swap(1000, 0.25)
        assert cost.swap_bandwidth == pytest.approx(2400)

    def test_nothing_measured_changes_nothing(self) -> None:
        cost = PreemptionCost()
        before = (cost.prefill_seconds, cost.swap_bandwidth)
        cost.observe_prefill(0, 1.0)
        cost.observe_prefill(10, 0.0)
        cost.observe_swap(0, 1.0)
        cost.observe_swap(10, 0.0)
        assert (cost.prefill_seconds, cost.swap_bandwidth) == before

    def test_a_swap_pays_both_ways(self) -> None:
        cost = PreemptionCost()
        cost.observe_prefill(10, 1.0)
        cost.observe_swap(1000, 1.0)
        assert cost.recompute_seconds(20) == pytest.approx(2.0)
        assert cost.swap_seconds(1000) == pytest.approx(2.0)
        assert cost.cheaper(20, 999) == "swap"
        assert cost.cheaper(20, 1000) == "recompute"


class TestVictim:
    def test_the_last_of_those_that_made_progress(self) -> None:
        groups = [group(idx) for idx in range(4)]
        assert choose_victim(groups) is groups[3]
        groups[3].is_shielded = True
        assert choose_victim(groups) is groups[2]

    def test_never_the_first_for_another(self) -> None:
        groups = [group(idx) for idx in range(3)]
        groups[1].is_shielded = groups[2].is_shielded = True
        assert choose_victim(groups) is groups[2]
        assert choose_victim(groups[:1]) is groups[0]


class TestOrder:
    def order(self, policy: str, *groups: tuple[SequenceGroup, int]) -> list[int]:
        queue = WaitingGroups(policy)  # type: ignore[arg-type]
        for one, num_steps in groups:
            queue.rank(one, num_steps)
            queue.add(one)
        return [one.arrival_idx for one in queue.candidates(10)]

    def test_fcfs_knows_no_priority(self) -> None:
        assert self.order("fcfs", (group(0, 9), 0), (group(1, -9), 1)) == [0, 1]

    def test_a_level_of_priority_is_worth_so_many_steps(self) -> None:
        patient = group(0, 1), 0
        assert self.order("priority", patient, (group(1), AGING_STEPS - 1)) == [1, 0]
        assert self.order("priority", patient, (group(1), AGING_STEPS + 1)) == [0, 1]

    def test_swapped_ones_are_in_the_same_order(self) -> None:
        swapped = group(1)
        swapped.status = GroupStatus.SWAPPED
        assert self.order("fcfs", (group(0), 0), (group(2), 0), (swapped, 0)) == [0, 1, 2]


@pytest.mark.parametrize("length", range(9))
def test_the_common_prefix_of_two_sequences(length: int) -> None:
    a, b = group(0).root, group(1).root
    a.token_ids = list(range(8))
    b.token_ids = [*range(length), *([99] * 4)]
    assert common_prefix(a, b) == common_prefix(b, a) == min(length, 8)

"""What sharing saves, at the lengths of the PagedAttention paper: virtual against paged."""

import pytest
import sharing
from workload import ALPACA, SHAREGPT, make_cache, make_trace

from vmalloc import SequenceGroupSpec

TRACES = {lengths: make_trace(lengths, 6, seed=3) for lengths in (SHAREGPT, ALPACA)}


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize("method", ["parallel", "beam"])
def test_virtual_saves_at_least_four_fifths_of_what_paged_saves(method, width):
    row = sharing.measure_case(method, width, TRACES[SHAREGPT])
    paged, virtual = row["paged"], row["virtual"]
    assert paged["saved"] > 0.1
    assert virtual["saved"] >= 0.8 * paged["saved"]
    for part in (virtual, paged):
        assert part["aliased_pages"] > 0
        assert part["cow_copies"] > 0
    assert (virtual["retired_share"] > 0) == (method == "beam")


@pytest.mark.parametrize("method", ["parallel", "beam"])
def test_short_sequences_share_the_same_pages_on_both(method):
    row = sharing.measure_case(method, 4, TRACES[ALPACA])
    assert row["virtual"]["saved"] == row["paged"]["saved"] > 0


@pytest.mark.parametrize("kind", ["virtual", "paged"])
def test_the_bytes_that_sharing_saves_are_those_that_separate_sequences_take(kind):
    with make_cache(kind, 8) as cache:
        cache.try_admit(SequenceGroupSpec((0,), 40))
        cache.try_fork(0, [1, 2])
        cache.try_extend([0, 1, 2], [41, 50, 60])
        stats = cache.stats()
        alone = sum(cache.bytes_for(num_tokens) for num_tokens in (41, 50, 60))
        assert stats.committed_bytes + stats.shared_bytes == alone
        assert stats.shared_bytes == 2 * 2 * stats.page_bytes  # two full pages, two more readers

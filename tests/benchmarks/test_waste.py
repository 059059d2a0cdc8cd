"""How little memory is committed beyond what tokens fill, in bytes."""

import pytest
import waste
from workload import ALPACA, MAX_SEQ_LEN, SHAREGPT, make_trace

PAGES = waste.CAPACITY_PAGES[SHAREGPT] // 2
TRACE = make_trace(SHAREGPT, 200, seed=0)


@pytest.mark.parametrize("policy", ["virtual", "paged"])
def test_sharegpt_like_lengths_leave_at_most_four_percent_unused(policy):
    row = waste.measure(policy, TRACE, PAGES)
    assert row["num_preemptions"] > 0  # memory was short
    assert row["token_states"] >= 0.96
    assert row["with_parked"] >= 0.96  # under pressure, what is ahead or parked is taken back


def test_what_is_ahead_and_parked_serves_growth_before_pages_are_created():
    row = waste.measure("virtual", TRACE, 8 * PAGES, max_num_seqs=32)
    assert row["token_states"] >= 0.96
    assert row["adopted_pages"] > 0
    assert row["reclaimed_pages"] > 0
    assert row["created_pages"] < row["capacity_pages"]  # the cap was never near
    assert row["num_preemptions"] == 0


def test_reserving_ahead_of_need_fits_fewer_sequences():
    trace = make_trace(ALPACA, 40, seed=0)
    pages = waste.CAPACITY_PAGES[ALPACA]
    rows = [waste.measure(policy, trace, pages) for policy in waste.POLICIES]
    assert [row["policy"] for row in rows] == [
        "max_length", "power_of_two", "oracle", "paged", "virtual",
    ]  # fmt: skip
    shares = [row["token_states"] for row in rows]
    fitted = [row["mean_live_seqs"] for row in rows]
    assert shares[:4] == sorted(shares[:4])
    assert fitted[:4] == sorted(fitted[:4])
    assert shares[4] == shares[3]
    assert fitted[4] == fitted[3]
    for row in rows:
        assert row["token_states"] + row["reserved"] + row["never_filled"] == pytest.approx(1)
        assert min(row["reserved"], row["never_filled"]) >= 0


@pytest.mark.parametrize("lengths", [SHAREGPT, ALPACA])
def test_drawn_lengths_have_the_means_of_the_paper(lengths):
    trace = make_trace(lengths, 20_000, seed=1)
    prompts = sum(request.num_prompt for request in trace) / len(trace)
    outputs = sum(request.num_output for request in trace) / len(trace)
    assert prompts == pytest.approx(lengths.prompt_mean, rel=0.05)
    assert outputs == pytest.approx(lengths.output_mean, rel=0.05)
    assert max(request.num_prompt + request.num_output for request in trace) <= MAX_SEQ_LEN
    assert trace[:10] == make_trace(lengths, 20_000, seed=1)[:10]

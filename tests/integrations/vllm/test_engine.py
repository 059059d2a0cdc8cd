"""vLLM itself, stock and with our KV memory, each in a process of its own."""

import pytest

MIB = 1 << 20


def assert_same_tokens(expected, gaps, got):
    """Equal, but where the two best logits tie to within rounding."""
    assert len(expected) == len(got)
    for number, (left, right) in enumerate(zip(expected, got, strict=True)):
        if left != right:
            pairs = enumerate(zip(left, right, strict=True))
            place = next(idx for idx, (one, other) in pairs if one != other)
            gap = gaps[number][place]
            print(f"request {number} differs from token {place} on, where the gap is {gap:.2e}")
            assert gap < 1e-4


def test_tokens_are_those_of_stock_vllm(served):
    stock, elastic = served("ragged", "stock"), served("ragged", "elastic")
    assert len(stock["tokens"]) == 32
    assert_same_tokens(stock["tokens"], stock["gaps"], elastic["tokens"])


def test_memory_starts_near_zero_and_grows_with_use(served):
    stock, elastic = served("ragged", "stock"), served("ragged", "elastic")
    for name in ("start", "peak"):
        left, right = stock[f"{name}_rss"], elastic[f"{name}_rss"]
        print(
            f"\nworker's RSS, {name}: stock {left / MIB:.0f} MiB, elastic {right / MIB:.0f} MiB "
            f"({right / left:.2f}x) for a pool of {stock['pool_bytes'] / MIB:.0f} MiB",
        )
    print(f"KV memory committed at peak: {elastic['stats']['peak_committed_bytes'] / MIB:.1f} MiB")
    pool = stock["pool_bytes"]
    assert stock["start_rss"] - elastic["start_rss"] > 0.9 * pool
    peak = elastic["stats"]["peak_committed_bytes"]
    assert 0 < peak < 0.2 * pool
    assert stock["peak_rss"] - elastic["peak_rss"] > 0.9 * pool - peak


def test_stock_vllm_never_sees_the_adapter(served):
    assert served("ragged", "stock")["modules"] == []
    assert served("ragged", "elastic")["modules"] != []


def test_ten_pools_of_requests_take_a_fifth_of_one(served):
    result = served("turnover", "elastic")
    pool = result["pool_bytes"]
    assert result["served_bytes"] >= 10 * pool
    print(
        f"\n{len(result['committed'])} requests, {result['served_bytes'] / pool:.1f} pools of "
        f"{pool / MIB:.0f} MiB: at most {max(result['committed']) / pool:.1%} of it between "
        f"requests and {result['busy']['peak_committed_bytes'] / pool:.1%} in one; "
        f"{result['idle']['created_bytes'] / pool:.2%} after idling"
    )
    assert max(result["committed"]) < 0.2 * pool
    assert result["busy"]["peak_committed_bytes"] < 0.2 * pool
    assert result["busy"]["created_bytes"] > result["start"]["created_bytes"]


def test_idling_returns_everything_but_the_null_block(served):
    result = served("turnover", "elastic")
    assert result["idle"]["held_extents"] == 1
    assert result["idle"]["created_bytes"] == result["start"]["created_bytes"]
    assert result["start"]["created_bytes"] < 0.01 * result["pool_bytes"]


def test_prefixes_are_still_cached(served):
    assert served("turnover", "elastic")["hits"] >= 512


def test_shortage_is_a_matter_of_scheduling(served):
    result = served("turnover", "elastic")
    assert result["refusals"] > 0
    assert result["scarce_bytes"] <= 4 * MIB
    assert_same_tokens(result["plenty_tokens"], result["plenty_gaps"], result["scarce_tokens"])


def test_sleep_returns_memory_and_waking_needs_none(served):
    result = served("turnover", "elastic")
    assert result["sleeping"]["held_extents"] == 1
    assert result["same_after_sleep"]


def test_memory_that_went_unannounced_is_computed_again(served):
    result = served("turnover", "elastic")
    assert result["discarded"]["held_extents"] == 1
    assert result["refused_after_discard"] == 1
    assert result["same_after_discard"]


def test_layers_of_two_kinds_share_the_memory(served):
    stock, elastic = served("mixed", "stock"), served("mixed", "elastic")
    assert_same_tokens(stock["tokens"], stock["gaps"], elastic["tokens"])
    assert elastic["idle"]["held_extents"] == 1
    assert elastic["idle"]["refused_steps"] == 0


@pytest.mark.parametrize("workload", ["ragged", "turnover"])
def test_nothing_was_refused_where_there_was_enough(served, workload):
    result = served(workload, "elastic")
    assert result["stats" if workload == "ragged" else "busy"]["refused_steps"] == 0

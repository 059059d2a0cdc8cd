"""Medians, ranges, ratios and verdicts, worked out by hand."""

import pytest

from vmalloc.engine.ab.metrics import METRICS, format_range_end, format_value
from vmalloc.engine.ab.statistics import (
    Comparison,
    Spread,
    chance_of_no_tie,
    compare,
    percentile,
    spread,
)


def test_a_spread_is_the_median_between_the_smallest_and_the_largest():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0, 2)
    assert spread([]) is None
    assert spread([1.0, None]) is None


def test_ratios_are_those_of_each_round():
    # 10/5, 30/10 and 20/20: their median is 2, that of the medians would be 20/10.
    assert compare([10, 30, 20], [5, 10, 20], "higher").ratio == Spread(2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize(
    ("first", "other", "better", "verdict"),
    [
        ([5, 6], [3, 4], "higher", "better"),
        ([5, 6], [3, 4], "lower", "worse"),
        ([3, 4], [5, 6], "higher", "worse"),
        ([3, 4], [5, 6], "lower", "better"),
        ([3, 5], [4, 6], "higher", "tie"),
        ([3, 4], [4, 5], "higher", "tie"),  # they touch
        ([1, 9], [4, 5], "lower", "tie"),  # one holds the other
        ([7, 7], [7, 7], "higher", "tie"),
        ([0, 0], [0, 0], "lower", "tie"),
        ([0, 0], [3, 4], "lower", "better"),
        ([5, 6], [3, 4], "neither", "unknown"),
        ([5], [3], "higher", "unknown"),
        ([5, None], [3, 4], "higher", "unknown"),
        ([], [], "higher", "unknown"),
    ],
)
def test_a_side_is_ahead_only_if_all_of_its_runs_are(first, other, better, verdict):
    assert compare(first, other, better).verdict == verdict


def test_nothing_over_nothing_is_one_and_something_over_nothing_is_no_ratio():
    assert compare([0, 0], [0, 0], "lower").ratio == Spread(1.0, 1.0, 1.0, 2)
    assert compare([1, 2], [0, 0], "lower") == Comparison(None, "worse")


def test_equals_stand_apart_by_chance_as_often_as_combinatorics_say():
    assert chance_of_no_tie(1) == 1.0
    assert chance_of_no_tie(3) == pytest.approx(2 / 20)
    assert chance_of_no_tie(5) == pytest.approx(2 / 252)


def test_percentiles_are_linear_between_the_nearest():
    assert percentile([10, 20, 30, 40], 50) == 25
    assert percentile([40, 10, 30, 20], 90) == pytest.approx(37)
    assert percentile([7], 99) == 7
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", "-"),
        (12_345.6, "rate", "12,346"),
        (99.94, "ms", "99.9"),
        (1.234, "us", "1.23"),
        (0.01234, "ms", "0.012"),
        (0.0, "ms", "0.00"),
        (3 << 20, "bytes", "3.00 MiB"),
        (0.0456, "share", "4.6%"),
        (1200.0, "count", "1,200"),
        (3.25, "count", "3.25"),
    ],
)
def test_values_for_people(value, unit, text):
    assert format_value(value, unit) == text


def test_ends_of_ranges_have_no_unit():
    assert format_range_end(3 << 20, "bytes") == "3.00"
    assert format_range_end(0.0456, "share") == "4.6"


def test_metrics_have_names_and_words_of_their_own():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.words for metric in METRICS}) == len(METRICS)

"""Intervals and paired tests against scipy, Holm's correction against closed testing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpeft import significance as interval
from fedpeft.significance import holm, p_value


@pytest.mark.parametrize(
    ("degrees", "wanted"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (30, 2.042272)]
)
def test_widths_are_those_of_tables(degrees: int, wanted: float) -> None:
    differences = list(np.random.default_rng(0).normal(0.3, 1, degrees + 1))
    found, error = interval.paired(differences), np.std(differences, ddof=1) / (degrees + 1) ** 0.5
    assert (found.high - found.mean) / error == pytest.approx(wanted, abs=1e-6)


def test_intervals_are_those_of_a_paired_test() -> None:
    rng = np.random.default_rng(0)
    for count in range(2, 12):
        for level in (0.5, 0.95, 0.999):
            left, right = rng.normal(0.3, 1, count), rng.normal(0, 1, count)
            wanted = stats.ttest_rel(left, right).confidence_interval(level)
            found = interval.paired(list(left - right), level)
            assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
            assert found.mean == pytest.approx((left - right).mean())


def test_verdicts() -> None:
    assert interval.Interval(1.0, -0.1, 2.1).verdict == "no difference"
    assert interval.Interval(1.0, 0.1, 1.9).verdict == "higher"
    assert interval.Interval(-1.0, -1.9, -0.1).verdict == "lower"
    with pytest.raises(ValueError, match="1 paired differences"):
        interval.paired([0.3])


def test_p_is_that_of_a_paired_test() -> None:
    rng = np.random.default_rng(0)
    for count in range(2, 12):
        left, right = rng.normal(0.3, 1, count), rng.normal(0, 1, count)
        wanted = stats.ttest_rel(left, right).pvalue
        assert p_value(list(left - right)) == pytest.approx(wanted, rel=1e-9)


def test_equal_differences_are_sure_unless_they_are_zero() -> None:
    assert p_value([0.0, 0.0, 0.0]) == 1.0
    assert p_value([0.5, 0.5]) == 0.0
    with pytest.raises(ValueError, match="1 paired differences: a test needs two"):
        p_value([0.5])


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holms_correction_is_closed_testing_by_bonferroni(values: list[float]) -> None:
    def closed(at: int) -> float:
        others = [value for i, value in enumerate(values) if i != at]
        families = [
            [values[at], *chosen]
            for size in range(len(others) + 1)
            for chosen in itertools.combinations(others, size)
        ]
        return max(min(1.0, len(family) * min(family)) for family in families)

    assert holm(values) == pytest.approx([closed(at) for at in range(len(values))])

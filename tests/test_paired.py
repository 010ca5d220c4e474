"""Means, standard errors and intervals, against numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from router_tuning.evaluation.paired import interval, mean, ratio_interval, standard_error


def test_mean_and_its_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean(values) == 0.6
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_one_value_has_no_error() -> None:
    assert standard_error([2.0]) is None
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


def test_an_interval_is_about_two_errors_around_the_mean() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] == pytest.approx(2 + 1.959964 / math.sqrt(3))
    assert found["low"] == pytest.approx(2 - 1.959964 / math.sqrt(3))


def test_a_ratio_of_rows_of_equal_size_is_a_mean() -> None:
    values = [1.0, 2.0, 6.0]
    halves = {name: value / 2 for name, value in interval(values).items() if value is not None}
    assert ratio_interval(values, [2.0, 2.0, 2.0]) == pytest.approx(halves)


def test_a_ratio_weighs_rows_by_their_size() -> None:
    found = ratio_interval([1.0, 30.0], [1.0, 10.0])
    assert found["mean"] == pytest.approx(31 / 11)
    # Where every token costs the same, there is nothing to be unsure of.
    sure = ratio_interval([1.0, 10.0], [1.0, 10.0])
    assert sure == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})

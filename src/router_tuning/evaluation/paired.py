"""Means, standard errors and paired differences with their 95 % confidence intervals.

Pure numbers. A paired difference compares two models row by row of the same task, so what makes
some rows harder than others falls out, and small changes can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL_95 = 1.959964
"""Standard errors on either side of a mean that hold 95 % of a normal distribution."""


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of values; None for a single one."""
    n = len(values)
    if n < 2:
        return None
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of values and its confidence interval: {"mean", "low", "high"}."""
    return _around(mean(values), standard_error(values))


def ratio_interval(values: Sequence[float], sizes: Sequence[float]) -> dict[str, float | None]:
    """Sum of values over sum of sizes, such as nats a token over rows of unequal length.

    The interval is that of the ratio estimator: rows are what was sampled, not their tokens.
    """
    total = sum(sizes)
    ratio = sum(values) / total
    rest = [value - ratio * size for value, size in zip(values, sizes, strict=True)]
    error = standard_error(rest)
    return _around(ratio, None if error is None else error * len(values) / total)


def _around(middle: float, error: float | None) -> dict[str, float | None]:
    if error is None:
        return {"mean": middle, "low": None, "high": None}
    reach = NORMAL_95 * error
    return {"mean": middle, "low": middle - reach, "high": middle + reach}

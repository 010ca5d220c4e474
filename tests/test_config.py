"""What a config refuses, and which threshold a budget gives."""

from __future__ import annotations

import math
from typing import Any

import pytest

from router_tuning.config import FORMAT_VERSION, RoutingConfig, check_budget, threshold_for
from router_tuning.errors import BudgetError, ConfigError

CALIBRATION = [{"budget": b, "threshold": t} for b, t in ((0.5, 2.0), (0.7, 1.0), (0.9, -1.0))]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"granularity": "attn"}, "granularity"),
        ({"granularity": "mlp_token"}, "not available in this version"),
        ({"granularity": []}, "granularity"),
        ({"granularity": ["attn_token", "attn_sequence"]}, "several"),
        ({"kv": "some"}, "kv must be one of all, kept"),
        ({"kv_sink": -1}, "kv_sink"),
        ({"kv_window": 1.5}, "kv_window"),
        ({"kv_window": True}, "kv_window"),
        ({"kv": "all", "kv_window": 4}, "kv_window"),
        ({"pooling": "prompt"}, "pooling"),
        ({"decide_after": 0}, "decide_after"),
        ({"router": "deep"}, "router"),
        ({"router_hidden": 0}, "router_hidden"),
        ({"init_bias": 0.0}, "init_bias"),
        ({"init_bias": math.inf}, "init_bias"),
        ({"layers": []}, "layers"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade router-tuning"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RoutingConfig(**changes).check()


def test_the_defaults_pass() -> None:
    RoutingConfig().check()
    RoutingConfig(granularity="attn_sequence", kv_sink=4, kv_window=16).check()


@pytest.mark.parametrize("budget", [0, -0.1, 1.2, math.nan, math.inf, "0.5", None, True])
def test_a_budget_out_of_range_is_refused(budget: Any) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        check_budget(budget)
    if budget is not None:
        with pytest.raises(BudgetError, match="above 0 and at most 1"):
            threshold_for(RoutingConfig(calibration=CALIBRATION), budget)
        with pytest.raises(BudgetError):
            RoutingConfig(budget=budget).check()


@pytest.mark.parametrize(
    ("budget", "threshold"),
    [(0.5, 2.0), (0.7, 1.0), (0.9, -1.0), (0.6, 1.5), (0.8, 0.0), (0.85, -0.5), (1.0, -math.inf)],
)
def test_a_budget_gives_its_threshold_or_one_between(budget: float, threshold: float) -> None:
    assert threshold_for(RoutingConfig(calibration=CALIBRATION), budget) == pytest.approx(threshold)


def test_no_budget_takes_the_default_and_without_one_zero() -> None:
    assert threshold_for(RoutingConfig(calibration=CALIBRATION), None) == 0.0
    config = RoutingConfig(calibration=CALIBRATION, default_budget=0.7)
    assert threshold_for(config, None) == 1.0


@pytest.mark.parametrize("budget", [0.4, 0.95])
def test_outside_the_calibrated_range_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"outside the calibrated range 0.5 to 0.9"):
        threshold_for(RoutingConfig(calibration=CALIBRATION), budget)


def test_one_calibrated_budget_stands_for_itself_only() -> None:
    config = RoutingConfig(calibration=CALIBRATION[1:2])
    assert threshold_for(config, 0.7) == 1.0
    with pytest.raises(BudgetError, match="outside"):
        threshold_for(config, 0.71)


def test_an_uncalibrated_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="no budget is calibrated"):
        threshold_for(RoutingConfig(), 0.8)

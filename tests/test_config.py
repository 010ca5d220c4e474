"""The config's checks, and thresholds for budgets: calibrated, between, outside."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

import router_tuning
from router_tuning.config import FORMAT_VERSION, RoutingConfig, check_budget, threshold_for
from router_tuning.errors import BudgetError, ConfigError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "attn_sequence", "decide_after": 1},
        {"granularity": "block_sequence", "pooling": "prompt"},
        {"granularity": ["attn_token"]},
        {"layers": [0]},
        {"layers": (0, 1)},
        {"calibration": [{"budget": 0.5, "threshold": -math.inf}], "base": {}},
        {"kv": "all"},
        {"kv_sink": 4, "kv_window": 16},
        {"router": "bottleneck", "router_hidden": 1},
        {"router": "bias", "init_bias": 1e-3},
        {"budget": 1.0, "default_budget": 0.01},
    ],
)
def test_good_configs_pass(options: dict[str, Any]) -> None:
    RoutingConfig(**options).check()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": "attention"}, "granularity must be one of attn_token"),
        ({"granularity": ["block_token", "mlp_token"]}, "a block holds its layer's attention and"),
        ({"granularity": []}, "at least one"),
        ({"granularity": ["attn_token", "attn_sequence"]}, "may name one of each kind"),
        ({"kv": "some"}, "kv must be one of all, kept, got 'some'"),
        ({"pooling": "mean"}, "pooling must be one of prefix, prompt"),
        ({"router": "mlp"}, "router must be one of linear, bottleneck, bias"),
        ({"kv_sink": -1}, "kv_sink must be a whole number of at least 0, got -1"),
        ({"kv_window": 1.5}, "kv_window must be a whole number"),
        ({"kv_window": True}, "kv_window must be a whole number"),
        ({"decide_after": 0}, "decide_after must be a whole number of at least 1"),
        ({"router_hidden": 0}, "router_hidden"),
        ({"init_bias": 0.0}, "init_bias must be positive"),
        ({"init_bias": math.inf}, "init_bias must be positive and finite"),
        ({"init_bias": math.nan}, "init_bias must be positive"),
        ({"layers": []}, "layers is empty"),
        ({"kv": "all", "kv_sink": 4}, 'kv_sink and kv_window go with kv="kept"'),
        ({"kv": "all", "kv_window": 4}, 'kv_sink and kv_window go with kv="kept"'),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade router-tuning"),
        ({"format_version": "2"}, "format_version must be a whole number of at least 1, got '2'"),
        ({"format_version": None}, "format_version must be a whole number"),
        ({"format_version": 0}, "format_version must be a whole number"),
        ({"layers": 3}, "layers must be a list of whole numbers .*; got 3"),
        ({"layers": "012"}, "layers must be a list of whole numbers .*; got '012'"),
        ({"layers": ["0"]}, "layers must be a list of whole numbers"),
        ({"layers": [True]}, "layers must be a list of whole numbers"),
        ({"granularity": None}, "granularity must be a name, or a list of names.*; got None"),
        ({"granularity": 3}, "granularity must be a name, or a list of names.*; got 3"),
        ({"granularity": [None]}, "granularity must be one of attn_token.*got None"),
        ({"kv": None}, "kv must be one of all, kept, got None"),
        ({"router": ["linear"]}, "router must be one of"),
        ({"init_bias": "x"}, "init_bias must be positive and finite.*got 'x'"),
        ({"init_bias": None}, "init_bias must be positive and finite.*got None"),
        ({"init_bias": True}, "init_bias must be positive and finite.*got True"),
        ({"kv_sink": "4"}, "kv_sink must be a whole number of at least 0, got '4'"),
        ({"decide_after": None}, "decide_after must be a whole number"),
        ({"calibration": 3}, "calibration must be a list with one entry a budget.*got 3"),
        ({"calibration": None}, "calibration must be a list with one entry a budget.*got None"),
        ({"calibration": {"budget": 0.5, "threshold": 0.0}}, "calibration must be a list"),
        ({"calibration": [3]}, r"calibration\[0\] must be a dict .* got 3; calibrate again"),
        (
            {"calibration": [{"budget": 0.5, "threshold": 0.0}, {"budget": 0.8}]},
            r"calibration\[1\] must be a dict with at least \"budget\" and \"threshold\"",
        ),
        ({"calibration": [{"threshold": 0.0}]}, r"calibration\[0\] must be a dict"),
        (
            {"calibration": [{"budget": 0.5, "threshold": "0"}]},
            r"calibration\[0\] threshold must be a number, got '0'",
        ),
        ({"calibration": [{"budget": 0.5, "threshold": math.nan}]}, "threshold must be a number"),
        ({"base": "some/model"}, "base must be the base model's identity .*got 'some/model'"),
    ],
)
def test_bad_configs_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RoutingConfig(**options).check()


@pytest.mark.parametrize("field", ["budget", "default_budget"])
@pytest.mark.parametrize("budget", [0, 0.0, -0.5, 1.2, math.nan, math.inf, "0.8", True])
def test_bad_budgets_are_named(field: str, budget: Any) -> None:
    with pytest.raises(BudgetError, match=f"^{field}: a budget is .* above 0 and at most 1; got"):
        RoutingConfig(**{field: budget}).check()
    entry = {"budget": budget, "threshold": 0.0}
    with pytest.raises(BudgetError, match=r"^calibration\[0\] budget: a budget is"):
        RoutingConfig(calibration=[entry]).check()
    with pytest.raises(BudgetError):
        check_budget(budget)


def test_a_good_budget_comes_back_as_a_float() -> None:
    assert check_budget(1) == 1.0
    assert isinstance(check_budget(1), float)


def calibrated(*points: tuple[float, float], default: float | None = None) -> RoutingConfig:
    entries: list[dict[str, Any]] = [{"budget": b, "threshold": t} for b, t in points]
    return RoutingConfig(calibration=entries, default_budget=default)


def test_thresholds_are_interpolated_between_budgets() -> None:
    config = calibrated((0.9, -1.0), (0.5, 1.0), (0.7, 0.5))  # in any order
    assert threshold_for(config, 0.5) == 1.0
    assert threshold_for(config, 0.7) == 0.5
    assert threshold_for(config, 0.9) == -1.0
    assert threshold_for(config, 0.6) == pytest.approx(0.75)
    assert threshold_for(config, 0.85) == pytest.approx(-0.625)


def test_one_calibrated_budget_serves_itself() -> None:
    assert threshold_for(calibrated((0.8, 0.25)), 0.8) == 0.25
    with pytest.raises(BudgetError, match=r"outside the calibrated range 0\.8 to 0\.8"):
        threshold_for(calibrated((0.8, 0.25)), 0.75)


def test_budget_one_needs_no_calibration() -> None:
    assert threshold_for(RoutingConfig(), 1.0) == -math.inf
    assert threshold_for(calibrated((0.5, 1.0)), 1) == -math.inf


def test_no_budget_is_the_default_budget_and_then_the_routers_own_threshold() -> None:
    assert threshold_for(RoutingConfig(), None) == 0.0
    assert threshold_for(calibrated((0.5, 1.0)), None) == 0.0
    assert threshold_for(calibrated((0.5, 1.0), (0.7, 0.0), default=0.6), None) == 0.5
    assert threshold_for(calibrated(default=1.0), None) == -math.inf


@pytest.mark.parametrize("budget", [0.800000011920929, 0.79999995])
def test_a_budget_that_went_through_float32_is_still_in_the_range(budget: float) -> None:
    assert threshold_for(calibrated((0.8, 0.25)), budget) == 0.25


@pytest.mark.parametrize("budget", [0.49, 0.91, 0.999])
def test_outside_the_calibrated_range_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"outside the calibrated range 0\.5 to 0\.9"):
        threshold_for(calibrated((0.5, 1.0), (0.9, -1.0)), budget)


def test_a_budget_without_calibration_is_refused_with_what_to_do() -> None:
    with pytest.raises(BudgetError, match="router-tuning calibrate"):
        threshold_for(RoutingConfig(), 0.8)


def test_the_config_can_be_read_without_torch() -> None:
    """`import router_tuning` loads torch, so its folder stands for the package here."""
    folder = next(iter(router_tuning.__path__))
    code = (
        "import sys, types\n"
        "package = types.ModuleType('router_tuning')\n"
        f"package.__path__ = [{folder!r}]\n"
        "sys.modules['router_tuning'] = package\n"
        "import router_tuning.config\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

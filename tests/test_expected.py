"""What a budget is expected to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laws import Case, routed_model
from router_tuning import (
    BudgetError,
    ConfigError,
    Windows,
    calibrate_windows,
    record,
    routing_of,
)
from router_tuning.cost import cost
from router_tuning.expected import ROWS, expected_trace, kept_per_unit
from tiny import VOCAB_SIZE

BUDGETS = [0.9, 0.7, 0.5]


def calibrated(case: Case) -> Any:
    """A routed model with budgets, and the text that they were calibrated on."""
    model = routed_model(case)
    ids = torch.randint(VOCAB_SIZE, (ROWS, 40), generator=torch.Generator().manual_seed(3))
    calibrate_windows(model, Windows(ids, torch.ones_like(ids, dtype=torch.bool)), BUDGETS)
    return model, ids


@pytest.mark.parametrize("kind", ["attn_token", "attn_sequence", "mlp_token", "block_token"])
@pytest.mark.parametrize("kv", ["all", "kept"])
def test_it_costs_what_the_calibration_text_cost(kind: str, kv: Any) -> None:
    model, ids = calibrated(Case(granularity=kind, kv=kv if kind != "mlp_token" else "all"))
    for budget in BUDGETS:
        with torch.no_grad(), record(model) as trace:
            model(ids, budget=budget)
        ran, expected = cost(model, trace), cost(model, expected_trace(model, budget, 40))
        assert expected.tokens == ran.tokens
        assert expected.dense_flops == ran.dense_flops
        assert expected.flops == pytest.approx(ran.flops, rel=0.03)
        assert expected.kv_bytes == pytest.approx(ran.kv_bytes, rel=0.06)


def test_decoded_tokens_are_forwards_of_their_own() -> None:
    model, _ = calibrated(Case(sink=2, window=3))
    trace = expected_trace(model, 0.7, 10, 3)
    assert [f.real_BT.shape[1] for f in trace.forwards] == [10, 1, 1, 1]
    assert [f.start for f in trace.forwards] == [0, 10, 11, 12]
    assert trace.kept_of_routed() == pytest.approx(0.7, abs=0.05)
    assert cost(model, trace).weight_bytes > 0


def test_between_budgets_it_lies_between_them_and_at_one_all_runs() -> None:
    model, _ = calibrated(Case())
    config = routing_of(model).config
    names = [unit.name for unit in routing_of(model).units]
    high, middle, low = (kept_per_unit(config, names, b) for b in (0.9, 0.8, 0.7))
    for name in names:
        assert middle[name] == pytest.approx((high[name] + low[name]) / 2)
    assert set(kept_per_unit(config, names, 1.0).values()) == {1.0}
    assert expected_trace(model, 1.0, 5).kept_fraction() == 1.0


def test_what_is_not_known_is_refused() -> None:
    model, _ = calibrated(Case())
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        expected_trace(model, 0.3, 5)
    with pytest.raises(ConfigError, match="at least 1 token"):
        expected_trace(model, 0.7, 0)
    for entry in routing_of(model).config.calibration:
        del entry["kept_per_unit"]
    with pytest.raises(BudgetError, match="calibrate it again"):
        expected_trace(model, 0.7, 5)

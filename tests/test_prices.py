"""budget_in="flops": what an execution weighs, and that every kept fraction goes by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from laws import randomize
from router_tuning import RoutingConfig, attach, record, routing_of
from router_tuning.baselines import Drops, StaticDrop, greedy_order, to_drop
from router_tuning.calibration import calibrate_windows
from router_tuning.cost import cost
from router_tuning.errors import ConfigError
from router_tuning.evaluation.perplexity import evaluate
from router_tuning.execution.context import decided_by, routers_of
from router_tuning.layer_cost import layer_costs
from router_tuning.routers import scalar_bias
from router_tuning.training.budget import count_kept
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import warm_start
from router_tuning.units import decoder_of
from test_calibration import kept, windows
from tiny import tiny_model, token_ids

BOTH = ["attn_token", "mlp_token"]


def routed(family: str = "llama", **config: Any) -> PreTrainedModel:
    model = tiny_model(family)
    model.requires_grad_(False)
    attach(model, RoutingConfig(**{"granularity": BOTH, "budget_in": "flops", **config}))
    randomize(model)
    for unit in routing_of(model).units:  # so that the kinds keep different parts
        bias = scalar_bias(routers_of(model)[unit.name])
        if unit.kind == "mlp" and bias is not None:
            bias.data += 0.5
    return model


def spent(model: PreTrainedModel, dropped: list[str]) -> float:
    """FLOPs of one token that sees itself."""
    with torch.no_grad(), decided_by(model, StaticDrop(dropped)), record(model) as trace:
        model(token_ids(1, 1), use_cache=True)  # else nobody ever asks for the keys
    return cost(model, trace).flops


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_neox"])
@pytest.mark.parametrize(
    "config",
    [
        {"kv": "all"},
        {"kv": "kept"},
        {"kv": "kept", "kv_window": 3},
        {"kv": "all", "granularity": "block_token"},
        {"kv": "kept", "granularity": "block_token"},
        {"layers": [1, 2]},
    ],
    ids=str,
)
def test_a_price_is_what_skipping_saves_of_linear_layers(
    family: str, config: dict[str, Any]
) -> None:
    model = routed(family, **config)
    prices = routing_of(model).prices
    whole = spent(model, [])
    per_price = set()
    for unit in routing_of(model).units:
        pair = layer_costs(decoder_of(model))[unit.layer_idx].pair if unit.kind != "mlp" else 0
        saved = whole - spent(model, [unit.name]) - pair
        per_price.add(round(saved / prices[unit.name], 3))
    assert len(per_price) == 1  # FLOPs that one price stands for


def test_prices_have_the_mean_one_over_routed_and_unrouted_units() -> None:
    assert sum(routing_of(routed()).prices.values()) == pytest.approx(8)
    assert sum(routing_of(routed(layers=[0, 3])).prices.values()) == pytest.approx(4)
    mlp, attention = (routing_of(routed()).prices[f"layers.0.{kind}"] for kind in ("mlp", "attn"))
    assert mlp > 1 > attention


def test_executions_weigh_alike_by_default() -> None:
    assert set(routing_of(routed(budget_in="executions")).prices.values()) == {1.0}


def test_what_a_budget_counts_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="budget_in must be one of executions, flops"):
        RoutingConfig(budget_in="seconds").check()


@pytest.mark.parametrize("config", [{}, {"layers": [1, 2, 3]}, {"kv": "all"}], ids=str)
def test_budgets_are_met_in_flops(config: dict[str, Any]) -> None:
    model = routed(**config)
    prices = routing_of(model).prices
    off = []
    for entry in calibrate_windows(model, windows(24), (0.9, 0.7, 0.5)):
        assert abs(entry["kept_fraction"] - entry["budget"]) <= 0.01
        assert kept(model, windows(24), entry["budget"]) == pytest.approx(entry["kept_fraction"])
        saved = {name: 1 - share for name, share in entry["kept_per_unit"].items()}
        assert entry["kept_fraction"] == pytest.approx(
            1 - sum(prices[name] * share for name, share in saved.items()) / 8
        )
        off.append(abs(1 - sum(saved.values()) / 8 - entry["kept_fraction"]))
    assert max(off) > 0.005  # counted in executions it would be something else


def test_training_counts_flops_and_pays_for_them() -> None:
    model = routed()
    prices = routing_of(model).prices
    with record(model) as trace, torch.no_grad():
        model(token_ids(2, 16), use_cache=False)
    forward = trace.forwards[0]
    gates = {}
    for name, unit in forward.units.items():
        gates[name] = unit.soft_BT = unit.keep_BT.float().requires_grad_()
    counted = count_kept(forward, trace.num_units, prices=trace.prices)
    assert counted.fraction.item() == pytest.approx(trace.kept_fraction())
    counted.fraction.backward()
    for name, gate_BT in gates.items():
        assert gate_BT.grad is not None
        assert torch.allclose(gate_BT.grad, torch.tensor(prices[name] / (8 * 32)))


def test_the_trainer_logs_the_kept_fraction_in_flops(tmp_path: Any) -> None:
    model = routed()
    arguments = RouterTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        logging_steps=1,
        warm_start=0,
        threshold_range=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    rows = [{"input_ids": row} for row in token_ids(2, 16)]
    with record(model) as trace, torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows]), use_cache=False)
    trainer = RouterTrainer(model, args=arguments, train_dataset=rows)
    trainer.train()
    logged = [entry["kept"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(trace.kept_fraction(), abs=1e-4)]


def test_a_start_favours_what_saves_more() -> None:
    rows = [{"input_ids": ids} for ids in token_ids(2, 16).split(1)]
    found = {}
    for what in ("executions", "flops"):
        model = tiny_model("llama")
        model.requires_grad_(False)
        attach(model, RoutingConfig(granularity=BOTH, router="bias", budget_in=what))
        warm_start(model, rows)
        names = [unit.name for unit in routing_of(model).units]
        biases = [scalar_bias(router).item() for router in routers_of(model).values()]  # type: ignore[union-attr]
        found[what] = dict(zip(names, biases, strict=True))
        prices = routing_of(model).prices

    def over(what: str) -> float:
        return found[what]["layers.1.mlp"] - found[what]["layers.1.attn"]

    assert over("flops") < over("executions")
    ratio = prices["layers.1.mlp"] / prices["layers.1.attn"]
    assert over("executions") - over("flops") == pytest.approx(
        float(torch.tensor(ratio).log()), abs=1e-4
    )


def test_static_controls_drop_as_many_flops() -> None:
    model = routed()
    budgets = [0.85, 0.6]
    calibrate_windows(model, windows(24), budgets)
    report = evaluate(
        model, windows(4, seed=2), budgets, compare=True, selection=windows(4, seed=1)
    )
    for name in ("static_cosine", "static_greedy"):
        fractions = [row["kept_fraction"] for row in report[name]]
        assert fractions == pytest.approx(budgets)


def test_drops_lie_around_a_budget() -> None:
    model = routed()
    prices = routing_of(model).prices
    order = [f"layers.{index}.{kind}" for index in range(4) for kind in ("attn", "mlp")]
    for budget in (1.0, 0.95, 0.7, 0.4):
        drops = Drops.of(model, order, budget)
        saved = sum(
            share * sum(prices[name] for name in order[:number]) for number, share in drops.runs()
        )
        assert saved == pytest.approx((1 - budget) * 8)
        assert drops.more - drops.fewer in (0, 1)
    assert Drops.of(model, order[:2], 0.1) == Drops(2, 2, 0.0)


def test_whole_numbers_of_units_are_exact() -> None:
    model = tiny_model("llama", num_hidden_layers=30)
    attach(model, RoutingConfig())
    order = [unit.name for unit in routing_of(model).units]
    around = {budget: Drops.of(model, order, budget) for budget in (0.9, 0.8, 0.7, 0.85, 1.0)}
    assert [(drops.fewer, drops.more) for drops in around.values()] == [
        (3, 3), (6, 6), (9, 9), (4, 5), (0, 0)
    ]  # fmt: skip
    assert around[0.85].runs() == [(4, 0.5), (5, 0.5)]
    assert math.floor((1 - 0.9) * 30) == 2  # which is why the count is rounded


def test_greedy_dropping_goes_on_until_it_saves_enough() -> None:
    model = routed()
    prices = routing_of(model).prices
    wanted = to_drop(model, 0.7)
    order = greedy_order(model, windows(2, 16), wanted)
    saved = [prices[name] for name in order]
    assert sum(saved) >= wanted > sum(saved[:-1])

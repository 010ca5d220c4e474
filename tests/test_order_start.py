"""The start of routers that decide about whole units: the greedy order of these."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from router_tuning import RouterTuningConfig, RoutingConfig, attach, record
from router_tuning.baselines import StaticDrop
from router_tuning.errors import TrainingError
from router_tuning.execution.context import decided_by, dense, routers_of, routing_of
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.optimizer import WHOLE_UNIT_STEP, parameter_groups
from router_tuning.training.order_start import EVERY, GAP, decides_whole_units, order_start
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import start_routers
from tiny import FAMILIES, tiny_model, token_ids

WHOLE: list[dict[str, Any]] = [
    {"granularity": "attn_sequence"},
    {"granularity": "block_sequence"},
    {"granularity": "attn_token", "router": "bias"},
    {"granularity": ("attn_sequence", "mlp_sequence"), "budget_in": "flops"},
]


def routed(family: str = "llama", **config: Any) -> Any:
    model = tiny_model(family)
    model.requires_grad_(False)
    attach(model, RoutingConfig(**{"decide_after": 4, **config}))
    return model


def inputs(rows: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in token_ids(rows, 16).split(1)]


def biases(model: Any) -> dict[str, float]:
    found = {name: scalar_bias(router) for name, router in routers_of(model).items()}
    return {name: bias.item() for name, bias in found.items() if bias is not None}


def rounds(model: Any, ids: Tensor, number: int) -> list[dict[str, float]]:
    """By full runs: in each round the divergence that each unit's absence adds, for its price."""

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, ::EVERY]
        return logits.float().log_softmax(-1)

    def divergence(dropped: list[str]) -> float:
        with decided_by(model, StaticDrop(dropped)):
            return float((teacher.exp() * (teacher - log_probabilities())).sum())

    with dense(model):
        teacher = log_probabilities()
    dropped: list[str] = []
    found: list[dict[str, float]] = []
    for _ in range(number):
        without = {
            unit.name: divergence([*dropped, unit.name])
            for unit in routing_of(model).units
            if unit.name not in dropped
        }
        before = divergence(dropped)
        prices = routing_of(model).prices
        found.append({name: (kl - before) / prices[name] for name, kl in without.items()})
        dropped.append(min(found[-1], key=lambda name: found[-1][name]))
    return found


def smallest(of: dict[str, float]) -> list[str]:
    return sorted(of, key=lambda name: of[name])


@pytest.mark.parametrize("config", WHOLE)
def test_logits_start_in_greedy_order_a_gap_apart(config: dict[str, Any]) -> None:
    model = routed(**config)
    measured = rounds(model, token_ids(3, 16), 3)
    ranking = order_start(model, inputs(), 0.5)
    found = biases(model)
    assert sorted(found) == sorted(ranking)
    assert ranking[:2] == [smallest(of)[0] for of in measured[:2]]
    rises = [found[b] - found[a] for a, b in pairwise(ranking)]
    assert rises == pytest.approx([GAP] * (len(ranking) - 1))
    weights = [input_weight(router) for router in routers_of(model).values()]
    assert not any(weight.any() for weight in weights if weight is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_and_the_last_round_orders_what_stays(family: str) -> None:
    model, ids = routed(family, granularity="attn_sequence"), token_ids(3, 16)
    first, second = rounds(model, ids, 2)
    ranking = order_start(model, inputs(), 0.5)
    assert ranking == [smallest(first)[0], *smallest(second)]
    with torch.no_grad(), record(model) as trace:
        model(ids)
    keep = trace.decisions()
    assert [bool(keep[name][:, 4:].all()) for name in ranking] == [False, False, True, True]
    assert not any(keep[name][:, 4:].any() for name in ranking[:2])


def test_padding_and_what_surrounds_the_call_change_nothing() -> None:
    pad = torch.nn.functional.pad
    padded = [
        {
            "input_ids": pad(one["input_ids"], (3, 2), value=7),
            "attention_mask": pad(torch.ones_like(one["input_ids"]), (3, 2)),
        }
        for one in inputs()
    ]
    plain, other = (routed(granularity="attn_sequence") for _ in range(2))
    other.train()
    seen: list[tuple[int, int]] = []
    assert order_start(plain, inputs(), 0.25) == order_start(
        other, padded, 0.25, lambda *n: seen.append(n)
    )
    assert biases(plain) == biases(other)
    assert other.training
    assert seen == [(n, 4 + 3 + 2) for n in range(1, 10)]


def test_without_a_budget_to_meet_or_text_there_is_no_order() -> None:
    model = routed(granularity="attn_sequence")
    assert order_start(model, inputs(), 1.0) == []
    assert set(biases(model).values()) == {1.0}
    with pytest.raises(TrainingError, match="no two tokens"):
        order_start(model, [{"input_ids": token_ids(1, 1)}], 0.5)


def test_a_budget_below_what_is_routed_orders_all_of_it() -> None:
    model = routed(granularity="attn_sequence", layers=[1, 2])
    assert sorted(order_start(model, inputs(), 0.25)) == ["layers.1.attn", "layers.2.attn"]
    assert max(biases(model).values()) < 0


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        *((config, True) for config in WHOLE),
        ({}, False),
        ({"granularity": ("attn_token", "mlp_sequence")}, False),
        ({"router": "bottleneck"}, False),
    ],
)
def test_who_decides_about_whole_units(config: dict[str, Any], whole: bool) -> None:
    model = routed(**config)
    assert decides_whole_units(model) == whole
    start_routers(model, inputs(), 0.5)
    steps = [(b - a) / GAP for a, b in pairwise(sorted(biases(model).values()))]
    assert all(step == pytest.approx(1.0) for step in steps) == whole


@pytest.mark.parametrize("warm_start", [0, 8])
@pytest.mark.parametrize("config", [*WHOLE, {}, {"router": "bottleneck"}])
def test_steps_are_short_from_an_order_only(
    config: dict[str, Any], warm_start: int, tmp_path: Path
) -> None:
    model = routed(**config)
    for router in routers_of(model).values():
        router.requires_grad_(True)
    arguments = RouterTrainingArguments(
        str(tmp_path),
        warm_start=warm_start,
        learning_rate=1e-2,
        bias_learning_rate=0.1,
        use_cpu=True,
        report_to="none",
    )
    spreads = {name: 4.0 for name in routers_of(model)}
    groups = parameter_groups(model, arguments, spreads)
    short = bool(warm_start) and decides_whole_units(model)
    step = WHOLE_UNIT_STEP if short else 1.0
    rates = {id(p): group["lr"] / step for group in groups for p in group["params"]}
    for router in routers_of(model).values():
        weight, bias = input_weight(router), scalar_bias(router)
        for parameter in router.parameters():
            usual = 0.1 if parameter is bias else 1e-2 / 4 if parameter is weight else 1e-2
            assert rates.pop(id(parameter)) == pytest.approx(usual)
    assert not rates
    # What the log shows is the rate of the arguments.
    told = {round(group["lr"] * group["divided_by"], 9) for group in groups}
    assert told <= {1e-2, 0.1}


def test_a_trainer_starts_there(tmp_path: Path) -> None:
    config = RouterTuningConfig(granularity="attn_sequence", decide_after=4, budget=0.8)
    model = get_peft_model(tiny_model("llama"), config)
    arguments = RouterTrainingArguments(
        str(tmp_path),
        max_steps=1,
        budget=0.5,
        learning_rate=0.0,
        bias_learning_rate=1e-9,
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids} for ids in token_ids(4, 16)]
    RouterTrainer(model, arguments, train_dataset=rows).train()
    wanted = routed(granularity="attn_sequence")
    order_start(wanted, inputs(4), 0.5)
    assert biases(model) == pytest.approx(biases(wanted), abs=1e-5)
    assert routing_of(model).config.budget == 0.8

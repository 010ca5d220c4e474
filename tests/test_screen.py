"""The benchmark that changes one thing of the recipe at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quality
import screen
import torch
from torch import nn

from router_tuning import (
    RouterTrainer,
    RouterTrainingArguments,
    RoutingConfig,
    attach,
    decided_by,
    record,
)
from router_tuning.execution.context import routers_of
from router_tuning.training.budget import Kept
from test_quality import words_of
from tiny import tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("progress_bars")


def routed() -> Any:
    model = tiny_model().requires_grad_(False)
    attach(model, RoutingConfig(granularity="attn_token", kv="all"))
    return model


def test_every_candidate_is_tuned_and_swept_beside_the_recipe(tmp_path: Path) -> None:
    words = [*words_of(tmp_path), "--setting", "all", "--seeds", "0,1", "--steps", "4"]
    words += ["--batch-size", "2", "--budgets", "0.8,0.5", "--argument", "warm_start=2"]
    screen.main(words)
    path = tmp_path / "result.json"
    runs = json.loads(path.read_text())["runs"]
    found = [(run["candidate"], run["seed"]) for run in runs]
    once = [name for name in screen.CANDIDATES if name != screen.RECIPE]
    assert sorted(found) == sorted(
        [(name, 0) for name in once]
        + [(name, seed) for name in (screen.RECIPE, screen.UNIT_THRESHOLDS) for seed in (0, 1)]
    )
    assert len({run["routed"]["text"][1]["loss"] for run in runs}) > len(runs) / 2
    numbers = {run["candidate"]: run.get("trainable") for run in runs}
    assert numbers["position"] == numbers[screen.RECIPE] + 4  # one more a layer
    assert numbers["bottleneck routers"] > 10 * numbers[screen.RECIPE]
    screen.main([*words, "--continue"])
    assert json.loads(path.read_text())["runs"] == runs


def test_a_hinge_asks_nothing_below_the_target(tmp_path: Path) -> None:
    for kept, asked in ((0.9, True), (0.2, False)):
        arguments = RouterTrainingArguments(
            str(tmp_path), anneal_fraction=0.0, use_cpu=True, budget=0.5, save_strategy="no"
        )
        trainer = screen.Hinge(routed(), arguments)
        executions = torch.tensor(100 * kept, requires_grad=True)
        loss = trainer._budget_loss(torch.tensor(1.0), Kept(executions, torch.tensor(100.0)))
        assert loss.requires_grad == asked


def test_a_budget_for_each_unit_reaches_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed()
    arguments = RouterTrainingArguments(
        str(tmp_path), anneal_fraction=0.0, use_cpu=True, budget=0.5, save_strategy="no"
    )
    trainer = screen.BudgetForEachUnit(model, arguments)
    next(iter(routers_of(model).values())).score.bias.data.fill_(-1.0)
    monkeypatch.setattr(quality.TaughtFromMemory, "teacher", RouterTrainer.teacher)
    trainer.compute_loss(model, {"input_ids": token_ids(2, 12)}).backward()
    first, *others = (router.score.bias.grad for router in routers_of(model).values())
    assert first < 0  # it keeps nothing
    assert all(grad > 0 for grad in others)  # they keep all


def test_noise_is_there_in_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    trainer = screen.Gumbel(
        model, RouterTrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no")
    )
    monkeypatch.setattr(quality.TaughtFromMemory, "teacher", RouterTrainer.teacher)
    inputs = {"input_ids": token_ids(2, 12)}
    losses = {trainer.compute_loss(model, inputs).item() for _ in range(3)}
    assert len(losses) == 3
    assert not any(router._forward_hooks for router in routers_of(model).values())


@pytest.mark.parametrize("feature", [screen.position, screen.previous_decision, screen.last_update])
def test_a_feature_moves_logits_with_a_weight_that_learns(feature: screen.Feature) -> None:
    model = routed()
    screen.seeing(feature)(model)
    routers: list[nn.Module] = list(routers_of(model).values())
    ids = token_ids(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
        moved = []
        for weight in (30.0, -30.0):
            for router in routers:
                router.get_parameter(screen.EXTRA).fill_(weight)
            moved.append(model(ids).logits)
    assert any(not torch.equal(plain, logits) for logits in moved)
    model(ids).logits.square().sum().backward()
    assert any(router.get_parameter(screen.EXTRA).grad.abs() > 0 for router in routers)


def test_equal_shares_are_equal_in_every_unit_of_the_text_they_were_found_on() -> None:
    torch.manual_seed(0)
    model, ids = routed(), token_ids(4, 50)
    for router in routers_of(model).values():
        torch.nn.init.normal_(router.score.weight)
    with torch.no_grad(), record(model) as trace, decided_by(model, screen.EqualShares(0.6)):
        model(ids)
    kept = trace.kept_per_unit().values()
    assert all(share == pytest.approx(0.6, abs=0.01) for share in kept)

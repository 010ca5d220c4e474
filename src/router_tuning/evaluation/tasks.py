"""Tasks: dense, routed at budgets, and under controls that skip as much.

`load_tasks` makes them, `evaluate_tasks` measures them and puts the rows of a report together.
Multiple choice and the loss of a given answer come from lm-evaluation-harness (harness_tasks.py),
`generation` does not (generation_check.py). What is measured of a row is a mapping of numbers, and
statistics are made of those: a control between two whole numbers of units is a weighted mean of
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from router_tuning.baselines import (
    Drops,
    RandomMask,
    StaticDrop,
    cosine_order,
    greedy_order,
)
from router_tuning.config import check_budget, threshold_for
from router_tuning.data import Progress, Windows, evaluation_mode
from router_tuning.errors import ConfigError
from router_tuning.evaluation.generation_check import GenerationCheck
from router_tuning.evaluation.harness import Harness, Tick, load_parts
from router_tuning.evaluation.harness_tasks import ChoiceTask, LossTask
from router_tuning.evaluation.perplexity import STATIC_RUNS, most_to_drop
from router_tuning.evaluation.variants import (
    DENSE,
    Items,
    Ran,
    Variant,
    weighted_items,
    weighted_shares,
)
from router_tuning.execution.context import routing_of
from router_tuning.execution.prompts import refuse_windows

GENERATION = "generation"
GREEDY_WINDOWS = 8
"""Windows on which the greedy choice of units runs; it is slow."""
DRIFT = 0.1
"""By how much less than a budget may be kept on a task's text for static dropping to follow."""


class Task(Protocol):
    """What can be measured under a variant, and compared with dense row by row."""

    name: str
    size: int
    """Requests of one measurement, for progress."""

    def measure(self, variant: Variant, tick: Tick) -> tuple[Items, Ran]:
        """Numbers of each row, and what ran. Dense comes first."""
        ...

    def about(self) -> dict[str, Any]:
        """What the numbers are of."""
        ...

    def summary(self, items: Items) -> dict[str, Any]:
        """What can be said of one variant alone."""
        ...

    def beside_dense(self, items: Items, dense: Items) -> dict[str, Any]:
        """What can be said of a variant beside dense."""
        ...


def load_tasks(
    names: Sequence[str],
    model: nn.Module,
    tokenizer: Any,
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Task]:
    """Tasks by name, for one model.

    Args:
        names: of the harness's tasks (with `folder`: those of local_tasks.LOCAL), or "generation".
        model: routed.
        tokenizer: of it.
        folder: of local JSONL files; None takes the harness's own data.
        shots: few-shot examples; None takes the paper's number.
        limit: rows of each task, at most, at equal distances in its file. None takes all.
        batch_size: rows of one forward, at most. Results do not depend on it.
        progress: called with tasks loaded, and tasks in all.

    Raises:
        ConfigError: an unknown name, or lm-eval is not installed.
        DataError: data that is missing or malformed.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    refuse_windows(model, "tasks")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-data {folder} is no folder; wanted one with JSONL files")
    parts = {}
    for done, name in enumerate(dict.fromkeys(names)):  # all, before a model is asked anything
        parts[name] = [] if name == GENERATION else load_parts(name, folder, shots)
        if progress is not None:
            progress(done + 1, len(names))
    harness = Harness(model, tokenizer, batch_size) if any(parts.values()) else None
    return [
        GenerationCheck(model, tokenizer, limit=limit, batch_size=batch_size)
        if harness is None or name == GENERATION
        else _task(name, found, harness, limit)
        for name, found in parts.items()
    ]


def _task(name: str, parts: Sequence[Any], harness: Harness, limit: int | None) -> Task:
    kinds = {part.OUTPUT_TYPE for part in parts}
    if kinds == {"multiple_choice"}:
        return ChoiceTask(name, parts, harness, limit)
    if kinds == {"loglikelihood"}:
        return LossTask(name, parts, harness, limit)
    raise ConfigError(
        f"the task {name} is of the kind {', '.join(sorted(kinds))}; wanted multiple_choice or "
        f"loglikelihood"
    )


def static_orders(
    model: nn.Module,
    selection: Windows,
    budgets: Sequence[float],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """Which units static dropping takes first, chosen on selection windows by either criterion: as
    many as the budgets need, and DRIFT more.
    """
    most = most_to_drop(model, max(min(budgets) - DRIFT, 0.0))
    few = selection.take(range(min(GREEDY_WINDOWS, len(selection))))
    with evaluation_mode(model):
        return {
            "static_cosine": cosine_order(model, selection, batch_size=batch_size),
            "static_greedy": greedy_order(model, few, most, progress=progress),
        }


def evaluate_tasks(
    model: nn.Module,
    tasks: Sequence[Task],
    budgets: Sequence[float],
    *,
    orders: Mapping[str, Sequence[str]] | None = None,
    seeds: Sequence[int] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure tasks dense and at budgets, and under the controls that are given.

    Args:
        model: the one that the tasks were loaded for, with these budgets calibrated.
        tasks: from `load_tasks`.
        budgets: kept fractions in (0, 1].
        orders: of static dropping, by the control's name (`static_orders`). As much is dropped as
            the routers skipped of the same task. None leaves it out.
        seeds: of random masks, at the rate that the routers had in each unit on the same task; none
            leaves them out.
        progress: called with requests done, and requests in all.

    Returns:
        By task: what it is, "dense", and a list of rows, one a budget, under "routed" and each
        control. docs/formats.md has the fields.

    Raises:
        BudgetError: a budget that is out of range or not calibrated.
    """
    budgets = [check_budget(b) for b in dict.fromkeys(budgets)]
    for budget in budgets:
        threshold_for(routing_of(model).config, budget)
    runs = 1 + len(budgets) * (1 + len(seeds) + STATIC_RUNS * len(orders or {}))
    total = runs * sum(task.size for task in tasks)
    done = 0

    def tick(requests: int) -> None:
        nonlocal done
        done += requests
        if progress is not None:
            progress(done, total)

    found = {}
    for task in tasks:
        one = _Measuring(model, task, tick)
        rows = one.routed(budgets)
        if seeds:
            rows["random"] = one.random(seeds)
        for name, order in (orders or {}).items():
            rows[name] = one.static(order, rows["routed"])
        found[task.name] = {**task.about(), "dense": task.summary(one.dense), **rows}
    return found


class _Measuring:
    """One task under one variant after another, beside dense."""

    def __init__(self, model: nn.Module, task: Task, tick: Tick) -> None:
        self.model, self.task, self.tick = model, task, tick
        self.dense, _ = task.measure(DENSE, tick)
        self.rates: dict[float, dict[str, float]] = {}

    def _row(self, budget: float, items: Items, shares: Mapping[str, float]) -> dict[str, Any]:
        summary = self.task.summary(items)
        return {
            "budget": budget,
            **shares,
            **summary,
            **self.task.beside_dense(items, self.dense),
        }

    def routed(self, budgets: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
        rows = []
        for budget in budgets:
            items, ran = self.task.measure(Variant(budget), self.tick)
            self.rates[budget] = ran.kept_per_unit()
            rows.append(self._row(budget, items, ran.shares()))
        return {"routed": rows}

    def random(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """A row for each routed one, at the rates it had."""
        rows = []
        for budget, rate in self.rates.items():
            runs = [
                self.task.measure(Variant(budget, RandomMask(rate, seed)), self.tick)
                for seed in seeds
            ]
            row = self._mean(budget, [(run, 1 / len(runs)) for run in runs])
            rows.append({**row, "seeds": list(seeds)})
        return rows

    def static(
        self, order: Sequence[str], routed: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """A row for each routed one, between the two whole numbers of units around what it kept:
        on other text than that of the calibration, this is not the budget.
        """
        kept = {row["budget"]: row["kept_fraction"] for row in routed}
        drops = {
            budget: Drops.of(self.model, order, fraction).runs()
            for budget, fraction in kept.items()
        }
        measured = {
            n: self.task.measure(Variant(1.0, StaticDrop(order[:n])), self.tick)
            for n in sorted({n for runs in drops.values() for n, _ in runs})
        }
        self.tick(self.task.size * (STATIC_RUNS * len(routed) - len(measured)))  # not needed
        return [
            {
                **self._mean(budget, [(measured[n], share) for n, share in runs]),
                "units": [list(order[:n]) for n, _ in runs],
            }
            for budget, runs in drops.items()
        ]

    def _mean(
        self, budget: float, runs: Sequence[tuple[tuple[Items, Ran], float]]
    ) -> dict[str, Any]:
        items = weighted_items([(found, weight) for (found, _), weight in runs])
        return self._row(budget, items, weighted_shares([(ran, w) for (_, ran), w in runs]))

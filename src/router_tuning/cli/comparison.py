"""What `demo` measures: its text, and those controls that are quick. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router_tuning.baselines import Drops, RandomMask, StaticDrop, cosine_order
from router_tuning.cli.adapters import Loaded
from router_tuning.cli.console import Bar, bar
from router_tuning.cli.material import Material, Recipe, prepare
from router_tuning.cli.tuning import Settings
from router_tuning.cost import flops_fraction
from router_tuning.data import Windows
from router_tuning.errors import DataError
from router_tuning.evaluation.perplexity import evaluate, window_loss
from router_tuning.execution.context import always_skipping, decided_by, record, routing_of

CALIBRATION_TOKENS = 1024
EVALUATION_TOKENS = 1024
HELD_OUT_SHARE = 0.45
"""Of the prompts: there are few, and the figure needs text of its own."""


@dataclass(frozen=True)
class DemoText:
    """What trains and calibrates, and what is measured; no prompt is on both sides."""

    material: Material
    """Its `held_out` is for calibration and for choosing what is dropped."""
    measured: Windows
    recipe: Recipe
    """Of the material: what was measured is no part of it."""

    @property
    def names(self) -> dict[str, str]:
        """For the record."""
        name = self.recipe.name
        return {"tuned": name, "measured": f"other answers of {name}"}


def demo_text(settings: Settings, base: Loaded, answers: Path) -> DemoText:
    """Answers of the frozen model, most for training, the others in two parts."""
    calibration = max(CALIBRATION_TOKENS // settings.length, 1)
    measured = max(EVALUATION_TOKENS // settings.length, 1)
    recipe = replace(
        settings.recipe(), held_out=calibration + measured, held_out_share=HELD_OUT_SHARE
    )
    material = prepare(recipe, base.model, base.tokenizer, answers=answers)
    held = material.held_out
    if len(held) < 2:
        raise DataError(
            f"the answers held back make {len(held)} window of {settings.length} tokens, and "
            f"two are the least (one to calibrate on, one to measure); ask for more --prompts "
            f"or a smaller --length"
        )
    first = min(calibration, len(held) // 2)
    return DemoText(
        Material(material.train, held.take(range(first))),
        held.take(range(first, len(held))),
        replace(recipe, held_out=first),
    )


def compare(model: Any, text: DemoText, budgets: Sequence[float], seed: int) -> dict[str, Any]:
    """The JSON of `eval` with random masks and static dropping by cosine similarity."""
    total = 1 + 3 * len(budgets)
    with bar(f"Evaluating {text.measured.num_tokens} tokens, with controls") as progress:
        result = evaluate(model, text.measured, budgets, progress=_first_of(progress, total))
        order = cosine_order(model, text.material.held_out)
        deciders: dict[str, list[Any]] = {
            "random": [RandomMask(_rates(model, b), seed) for b in budgets],
            "static_cosine": [StaticDrop(_nearest(model, order, b)) for b in budgets],
        }
        done = 1 + len(budgets)
        for name, chosen in deciders.items():
            result[name] = []
            for budget, decider in zip(budgets, chosen, strict=True):
                result[name].append({"budget": budget, **_measure(model, text.measured, decider)})
                done += 1
                progress(done, total)
    return result


def _first_of(progress: Bar, total: int) -> Callable[[int, int], None]:
    """Show the passes of `evaluate` as the first of all."""
    return lambda done, windows: progress(done, windows * total // (1 + (total - 1) // 3))


def _rates(model: Any, budget: float) -> dict[str, float]:
    """How much of each unit the routers keep at a budget."""
    entries = routing_of(model).config.calibration
    return dict(next(e for e in entries if e["budget"] == budget)["kept_per_unit"])


def _nearest(model: Any, order: Sequence[str], budget: float) -> Sequence[str]:
    """Of an order, the whole number of units nearest to a budget."""
    drops = Drops.of(model, order, budget)
    return order[: drops.fewer + round(drops.share)]


def _measure(model: Any, windows: Windows, decider: Any) -> dict[str, Any]:
    with always_skipping(model), decided_by(model, decider), record(model) as trace:
        result = window_loss(model, windows)
    return {
        "kept_fraction": trace.kept_fraction(),
        "kept_of_routed": trace.kept_of_routed(),
        "loss": result.loss,
        "answer_loss": result.answer_loss,
        "flops_fraction": flops_fraction(model, trace),
    }

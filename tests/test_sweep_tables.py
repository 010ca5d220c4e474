"""The table of one adapter for many budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sweep_tables


def run(budget: float, loss: float, seed: int = 0, steps: int = 9) -> dict[str, Any]:
    """A sweep down to half, whose loss rises evenly to this."""
    routed = [{"kept_fraction": 0.5, "loss": loss, "answer_loss": None}]
    return {
        "setting": "all",
        "seed": seed,
        "tuning": {"budget": budget, "steps": steps},
        "routed": {"wikitext": routed},
    }


def table(tmp_path: Path, runs: list[dict[str, Any]]) -> str:
    document = {
        "run": {"model": "tiny"},
        "dense": {"wikitext": {"loss": 3.0, "answer_loss": None}},
        "runs": runs,
    }
    path = tmp_path / "quality-tiny.json"
    path.write_text(json.dumps(document))
    return sweep_tables.swept(path, "")


def test_the_smallest_budget_is_set_beside_the_one_that_was_tuned_for(tmp_path: Path) -> None:
    lines = table(tmp_path, [run(0.6, 4.0), run(0.8, 3.5), run(0.7, 4.5)]).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| 0.80",
        "| 0.70",
        "| 0.60",
        "| 0.60, over that tuned for it",
    ]
    assert lines[4].split(" | ")[1:] == ["+0.100", "+0.150", "+0.200", "+0.250", "+0.300 |"]
    # Tuned to 0.6 it loses 0.4 at 0.8 and 0.6 at 0.7; tuned for these, 0.2 and 0.9.
    assert lines[7].split(" | ")[1:] == ["-", "-", "+0.200", "-", "-0.300 |"]


def test_other_seeds_and_recipes_stand_apart(tmp_path: Path) -> None:
    assert not table(tmp_path, [run(0.6, 4.0), run(0.8, 3.5), run(0.7, 4.5, seed=1)])
    assert not table(tmp_path, [run(0.6, 4.0), run(0.8, 3.5), run(0.7, 4.5, steps=8)])

"""Costs and losses are read at the same kept fraction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pareto
import pytest


def cell(kept: float, prefill: float) -> dict[str, Any]:
    """What bench says of one budget: three of four attentions kept by static dropping."""
    return {
        "batch_size": 1,
        "prompt_tokens": 8,
        "new_tokens": 2,
        "kept_of_routed": kept,
        "prefill": {
            "over_dense": {"routed": prefill, "static": 0.9},
            "flops_fraction": {"routed": 0.9, "floor": 0.6},
        },
        "decode": {"over_dense": {"routed": 0.8, "static": 0.85}},
        "memory": {
            "dense": {"kv_bytes": 400},
            "routed": {"kv_bytes": 200},
            "static": {"kv_bytes": 300},
        },
    }


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with two seeds of `kept`, timed at kept 0.5, and static dropping."""
    rows = [{"kept_fraction": k, "loss": 2 + (1 - k), "answer_loss": 2 + (1 - k)} for k in (0.5,)]
    runs = [
        {
            "setting": "kept",
            "seed": seed,
            "tuning": {},
            "routed": {"alpaca": rows, "wikitext": rows},
        }
        for seed in (0, 1)
    ]
    dense = {"loss": 2.0, "answer_loss": 2.0, "tokens": 8}
    static = {"greedy": rows, "cosine": rows}
    quality = {
        "dense": {"alpaca": dense, "wikitext": dense},
        "static": {"alpaca": static, "wikitext": static},
        "runs": runs,
    }
    run = {"device": "cpu", "dtype": "bfloat16", "threads": 1}
    timed = {"cells": [cell(0.5, 0.7)], "run": run}
    (tmp_path / "quality-tiny.json").write_text(json.dumps(quality))
    (tmp_path / "pareto-tiny-kept.json").write_text(json.dumps(timed))
    monkeypatch.setattr(pareto, "RESULTS", tmp_path)
    return tmp_path


def test_a_row_has_costs_and_losses_of_one_kept_fraction(results: Path) -> None:
    lines = pareto.table("tiny", "").splitlines()
    routed = next(line for line in lines if line.startswith('| token, kv="kept" | 0.75'))
    # Half way between dense and what was measured at 0.5; losses are 1 - kept.
    assert routed.split(" | ")[2:] == ["0.95", "0.85", "0.90", "0.75", "+0.250", "+0.250 |"]
    dropped = next(line for line in lines if line.startswith("| static, greedy | 0.75"))
    # An attention is worth 0.4 of all work, and a quarter of them is gone.
    assert dropped.split(" | ")[2:] == ["0.90", "0.90", "0.85", "0.75", "+0.250", "+0.250 |"]


def test_no_cost_is_made_up_where_none_was_measured(results: Path) -> None:
    kept = pareto.KEPT[0]
    (results / "pareto-tiny-kept.json").write_text(
        json.dumps({"cells": [cell(0.95, 0.99)], "run": {"device": "", "dtype": "", "threads": 1}})
    )
    row = next(
        line
        for line in pareto.table("tiny", "").splitlines()
        if line.startswith(f'| token, kv="kept" | {kept:.2f}')
    )
    assert row.split(" | ")[2:6] == ["-"] * 4


def test_the_figure_is_drawn(results: Path) -> None:
    path = results / "figure.png"
    pareto.draw("tiny", path)
    assert path.stat().st_size > 0

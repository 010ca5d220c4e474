"""The tables of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import task_tables


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def test_tasks_stand_beside_dense_and_controls(tmp_path: Path) -> None:
    dense = {"rows": 40, "accuracy": 0.6, "stderr": 0.08, "chance": 0.25}
    ran = {"budget": 0.75, "kept_fraction": 0.741}
    choice: dict[str, Any] = {
        **dense,
        "accuracy": 0.55,
        **ran,
        "share_above_chance": 0.857,
        "gold_difference": interval(-0.2),
        "among_choices_difference": interval(-0.05),
    }
    loss = {**ran, "loss": 2.1, "loss_difference": interval(0.1)}
    said = {"repetition": 0.2, "loss_of_dense": 0.5}
    wrote = {**ran, **said, "agreement": interval(0.8), "same_beginning": 0.4}
    document = {
        "run": {"device": "cpu", "dtype": "bfloat16"},
        "tasks": {
            "piqa": {
                "kind": "choice",
                "shots": 0,
                "dense": dense,
                "routed": [choice],
                "static_greedy": [{**choice, "share_above_chance": None}],
            },
            "gsm8k": {"kind": "loss", "dense": {"loss": 2.0}, "routed": [loss]},
            "generation": {"kind": "generation", "dense": said, "routed": [wrote]},
        },
    }
    path = tmp_path / "tasks-tiny-all.json"
    path.write_text(json.dumps(document))
    text = task_tables.tasks(path, "")
    assert text.startswith("**Tasks, tiny-all**")
    assert (
        "| piqa (0, 40) | routed | 0.75 | 0.741 | 0.550 ± 0.080 | 86% | -0.200 (-0.300 to -0.100) "
        "| -0.050 (-0.150 to +0.050) |"
    ) in text
    assert "| piqa (0, 40) | static, greedy | 0.75 | 0.741 | 0.550 ± 0.080 | - |" in text
    assert "| gsm8k | routed | 0.75 | 0.741 | 2.100 | +0.100 (+0.000 to +0.200) |" in text
    assert "| generation | routed | 0.75 | 0.741 | 0.800 (0.700 to 0.900) | 0.400 |" in text
    tables = [part.splitlines() for part in text.split("\n\n")]
    for table in ([line for line in lines if line.startswith("|")] for lines in tables):
        assert len({line.count("|") for line in table}) <= 1

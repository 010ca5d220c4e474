"""The table of what else could be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import screen_tables


def row(kept: float, loss: float) -> dict[str, Any]:
    return {"kept_fraction": kept, "loss": loss, "answer_loss": None}


def run(candidate: str, seed: int, loss: float) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "seed": seed,
        "setting": "kept",
        "tuning": {"train_tokens": 61440},
        "trainable": 1234,
        "tuning_seconds": 99.6,
        "routed": {"wikitext": [row(0.8, loss)]},
    }


def test_candidates_stand_beside_the_recipe_of_their_seed(tmp_path: Path) -> None:
    document = {
        "run": {"model": "tiny", "report_windows": 4},
        "dense": {"wikitext": row(1.0, 3.0)},
        "static": {"wikitext": {"cosine": [row(0.8, 3.4)]}},
        "runs": [run("recipe", 0, 3.1), run("hinge", 0, 3.3), run("recipe", 1, 3.3)],
    }
    path = tmp_path / "screen-tiny.json"
    path.write_text(json.dumps(document))
    lines = screen_tables.screened(path, "").splitlines()
    recipe = next(line for line in lines if line.startswith("| recipe"))
    # Half way to +0.1 and +0.3 at 0.90, three quarters of the way at 0.85.
    expected = ["| recipe", "+0.100 ± 0.071", "+0.150 ± 0.106", "+0.200 ± 0.141", "1,234", "100 |"]
    assert recipe.split(" | ") == expected
    hinge = next(line for line in lines if line.startswith("| hinge"))
    assert hinge.split(" | ")[1:4] == ["+0.150 (+0.100)", "+0.225 (+0.150)", "+0.300 (+0.200)"]
    static = next(line for line in lines if line.startswith("| static drop, cosine"))
    assert static.split(" | ")[1:4] == ["+0.200", "+0.300", "+0.400"]
    assert recipe.count("|") == hinge.count("|") == static.count("|") == lines[2].count("|")

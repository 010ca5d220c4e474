"""The table of what others train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers_tables


def test_a_training_of_all_weights_starts_from_what_it_made_of_the_dense_model(
    tmp_path: Path,
) -> None:
    def row(kept: float, loss: float) -> dict[str, Any]:
        return {"kept_fraction": kept, "loss": loss, "answer_loss": None}

    run = {
        "method": "mod_topk",
        "seed": 0,
        "tuning": {"kv": "all", "dtype": "bfloat16", "times": 3.0},
        "steps": 7,
        "train_tokens": 3584,
        "seconds": 12.4,
        "peak_bytes": 2_000_000_000,
        "trainable": 1000,
        "threads": 1,
        "everything_kept": {"wikitext": row(1.0, 2.5)},
        "routed": {"wikitext": [row(0.8, 3.3)]},
    }
    document = {
        "run": {"model": "tiny", "device": "cpu"},
        "dense": {"wikitext": row(1.0, 3.0)},
        "static": {"wikitext": {"greedy": [row(0.8, 3.4)]}},
        "runs": [run],
    }
    path = tmp_path / "peers-tiny.json"
    path.write_text(json.dumps(document))
    lines = peers_tables.trained(path, "").splitlines()
    mixture = next(line for line in lines if line.startswith("| mixture"))
    # Half way between -0.5 with everything kept and +0.3 at 0.8; nothing was measured at 0.7.
    assert mixture.split(" | ")[-4:] == ["-0.500", "-0.100", "+0.300", "- |"]
    assert "3 x the time" in mixture
    static = next(line for line in lines if line.startswith("| static drop, greedy"))
    assert static.split(" | ")[-4:] == ["-", "+0.200", "+0.400", "- |"]
    assert mixture.count("|") == static.count("|") == lines[2].count("|")

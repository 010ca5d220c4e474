"""The benchmark of loss against kept fraction: the mean of seeds beside them, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quality

from tiny import SENTENCES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("progress_bars")


def test_the_mean_of_seeds_stands_beside_them_and_is_made_once(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, shift in (("train", 0), ("report", 2)):
        rows = [{"text": SENTENCES[(i + shift) % 5] * 9} for i in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    result = tmp_path / "quality.json"
    words = ["--model", str(tmp_path / "base"), "--train", str(tmp_path / "train.jsonl")]
    words += ["--report", f"text={tmp_path / 'report.jsonl'}", "--settings", "kept"]
    words += ["--seeds", "0,1", "--steps", "3", "--batch-size", "2", "--budgets", "0.8,0.5"]
    words += ["--held-back-windows", "2", "--report-windows", "2", "--json", str(result)]
    words += ["--argument", "warm_start=4", "--save", str(tmp_path / "adapters"), "--average"]
    quality.main(words)
    runs = json.loads(result.read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, [0, 1]]
    mean = runs[-1]
    assert mean["tuning"] == {**runs[0]["tuning"], "averaged": 2}
    assert mean["tuning"]["adam_beta2"] == 0.98
    losses = [[row["loss"] for row in run["routed"]["text"]] for run in runs]
    assert losses[2] not in losses[:2]
    assert all(row["kept_fraction"] < 1 for row in mean["routed"]["text"])
    quality.main([*words, "--continue"])
    assert json.loads(result.read_text())["runs"] == runs
    words[words.index("0.8,0.5")] = "0.65"
    quality.main([*words, "--continue", "--widen"])
    wider = json.loads(result.read_text())["runs"]
    for run, before in zip(wider, runs, strict=True):
        assert run["routed"]["text"][:2] == before["routed"]["text"]
        assert run["routed"]["text"][2]["budget"] == 0.65

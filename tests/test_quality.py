"""The benchmarks of loss against kept fraction: the mean of seeds beside them, going on, both kinds
of unit under one budget, and the best subset of each window.
"""

from __future__ import annotations

import json
from pathlib import Path

import oracle_tables
import pytest
import quality
import quality_tables
import sequence_oracle

from tiny import SENTENCES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("progress_bars")


def words_of(folder: Path) -> list[str]:
    """A tiny model and two texts, as the benchmarks are told."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, shift in (("train", 0), ("report", 2)):
        rows = [{"text": SENTENCES[(i + shift) % 5] * 9} for i in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    words = ["--model", str(folder / "base"), "--train", str(folder / "train.jsonl")]
    words += ["--report", f"text={folder / 'report.jsonl'}", "--json", str(folder / "result.json")]
    return [*words, "--held-back-windows", "2", "--report-windows", "2"]


def test_the_mean_of_seeds_stands_beside_them_and_is_made_once(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    words = [*words_of(tmp_path), "--settings", "kept"]
    words += ["--seeds", "0,1", "--steps", "3", "--batch-size", "2", "--budgets", "0.8,0.5"]
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


def test_attentions_and_mlps_share_a_budget_in_flops_with_their_controls(tmp_path: Path) -> None:
    words = [*words_of(tmp_path), "--settings", "both", "--static-of", "both", "--static", "1,2"]
    words += ["--steps", "3", "--batch-size", "2", "--budgets", "0.8,0.5", "--greedy-windows", "1"]
    quality.main([*words, "--argument", "warm_start=4"])
    document = json.loads((tmp_path / "result.json").read_text())
    orders = document["static"]["orders"]
    for order in orders.values():
        assert {name.rpartition(".")[2] for name in order} <= {"attn", "mlp"}
    assert len(set(orders["cosine"])) == 2 * 4  # of every layer both
    one, two = document["static"]["text"]["cosine"]
    assert 1 > one["kept_fraction"] > two["kept_fraction"]
    # In FLOPs, an MLP is more of the whole than an attention.
    assert {1 - one["kept_fraction"], 1 - two["kept_fraction"]} != {1 / 8, 2 / 8}
    (run,) = document["runs"]
    assert [row["kept_fraction"] < 1 for row in run["routed"]["text"]] == [True, True]
    kinds = [label for label, _, _ in quality_tables.deciders(document, ["text"])]
    assert len(kinds) == 3
    assert "budget in FLOPs" in kinds[0]


def test_the_best_subset_of_a_window_loses_no_more_of_it_than_another(tmp_path: Path) -> None:
    words = [*words_of(tmp_path), "--static", "1,2", "--greedy-windows", "1"]
    sequence_oracle.main(words)
    path = tmp_path / "result.json"
    document = json.loads(path.read_text())
    windows = document["texts"]["text"]
    assert len(windows) == 2
    for one in windows:
        for other in ("elsewhere", "overall", "before"):
            assert one["own"][0]["loss"] <= one[other][0]["loss"] + 1e-6  # one: all were tried
    overall, elsewhere = (
        sum(one[name][0]["loss"] for one in windows) for name in ("overall", "elsewhere")
    )
    assert overall <= elsewhere + 1e-6
    assert any(one["own"][0] != one["dense"] for one in windows)
    table = oracle_tables.oracle(path, "../")
    assert table.count("\n| text, 2 |") == 4
    assert "later half, 2 dropped" in table

    document["texts"]["text"] = windows[:1]
    path.write_text(json.dumps(document))
    sequence_oracle.main([*words, "--continue"])
    assert json.loads(path.read_text())["texts"]["text"] == windows


def test_more_static_controls_join_those_that_were_measured(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    words = [*words_of(tmp_path), "--greedy-windows", "1", "--static"]
    quality.main([*words, "1,3"])
    before = json.loads(result.read_text())["static"]
    quality.main([*words, "2,3,4", "--continue"])
    after = json.loads(result.read_text())["static"]
    assert after["orders"] == before["orders"]
    assert [row["units"] for row in after["text"]["cosine"]] == [1, 2, 3, 4]
    assert [row["units"] for row in after["text"]["greedy"]] == [1, 2, 3]  # three were chosen
    assert after["text"]["greedy"][::2] == before["text"]["greedy"]

"""Tables and figures: what stands in them, from dicts alone."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from router_tuning.errors import RouterTuningError
from router_tuning.report.curves import CURVES
from router_tuning.report.figures import STYLES, curve, loss_figure
from router_tuning.report.tables import budget_table, evaluation_table


def row(budget: float, loss: float, **changes: Any) -> dict[str, Any]:
    """A row of `eval`'s JSON."""
    fields = {
        "budget": budget,
        "kept_fraction": budget + 0.004,
        "kept_of_routed": budget,
        "loss": loss,
        "answer_loss": loss / 2,
        "flops_fraction": 0.5 + budget / 2,
    }
    return {**fields, **changes}


@pytest.fixture
def result() -> dict[str, Any]:
    """An evaluation with every control."""
    return {
        "dense": {"loss": 2.0, "answer_loss": 1.0, "tokens": 2048},
        "routed": [row(0.9, 2.01), row(0.8, 2.1), row(0.7, 2.4)],
        "random": [row(0.9, 2.3), row(0.8, 3.0), row(0.7, 3.8)],
        "random_uniform": [row(0.9, 2.5), row(0.8, 3.4), row(0.7, 4.4)],
        "static_cosine": [row(0.9, 2.15), row(0.8, 2.5), row(0.7, 3.5)],
        "static_greedy": [row(0.9, 2.06), row(0.8, 2.21), row(0.7, 2.9)],
        "learned_static": [row(0.9, 2.08), row(0.8, 2.2), row(0.7, 2.7)],
    }


def text(table: Table) -> str:
    """What a table prints, 120 columns wide."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(table: Table, word: str) -> list[str]:
    """The cells of the first line that begins with a word."""
    lines = [[c.strip() for c in line.strip("│").split("│")] for line in text(table).splitlines()]
    return next(line for line in lines if line[0] == word)


def test_evaluation_table_has_the_loss_over_dense(result: dict[str, Any]) -> None:
    table = evaluation_table(result)
    assert cells(table, "dense") == ["dense", "", "1.000", "2.0000", "", "1.0000", "1.000"]
    routed = ["routers", "0.9", "0.904", "2.0100", "+0.0100", "1.0050", "0.950"]
    assert cells(table, "routers") == routed
    for label in CURVES.values():
        assert text(table).count(f" {label} ") == 3


def test_evaluation_table_without_controls_and_answers(result: dict[str, Any]) -> None:
    dense = {**result["dense"], "answer_loss": None}
    table = evaluation_table({"dense": dense, "routed": [row(0.9, 2.01, answer_loss=None)]})
    assert "random" not in text(table)
    assert cells(table, "routers")[5] == "-"


def test_budget_table_is_sorted_and_marks_what_is_not_known() -> None:
    entry = {"threshold": -0.25, "kept_fraction": 0.701, "kept_of_routed": 0.6}
    table = budget_table(
        [{**entry, "budget": 0.7}, {**entry, "budget": 0.9, "loss": 2.0, "loss_over_dense": 0.01}]
    )
    assert text(table).index(" 0.9 ") < text(table).index(" 0.7 ")
    assert cells(table, "0.9") == ["0.9", "0.701", "0.600", "-0.250", "2.0000", "+0.0100"]
    assert cells(table, "0.7")[4:] == ["-", "-"]


def test_curve_ends_at_the_dense_model(result: dict[str, Any]) -> None:
    points = curve(result, "routed")
    assert points[-1] == (1.0, 0.0)
    assert [kept for kept, _ in points] == sorted(kept for kept, _ in points)
    assert points[0] == pytest.approx((0.704, 0.4))
    assert curve(result, "something else") == []


def test_every_curve_has_a_style_of_its_own() -> None:
    assert STYLES.keys() == CURVES.keys()
    for key in ("color", "marker"):
        assert len({style[key] for style in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figure_is_written_whole(tmp_path: Path, result: dict[str, Any], ending: str) -> None:
    path = loss_figure(result, tmp_path / f"f.{ending}", "a title")
    assert [p.name for p in tmp_path.iterdir()] == [f"f.{ending}"]
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 10_000


def test_figure_names_its_curves(tmp_path: Path, result: dict[str, Any]) -> None:
    del result["learned_static"]
    path = loss_figure(result, tmp_path / "f.svg")
    drawn = path.read_text()
    for name, label in CURVES.items():  # matplotlib writes each text as a comment before its glyphs
        assert (f"<!-- {label} -->" in drawn) == (name != "learned_static")
    assert "<!-- dense, 2.000 -->" in drawn


def test_figure_where_nothing_can_be_written(tmp_path: Path, result: dict[str, Any]) -> None:
    with pytest.raises(RouterTuningError, match="cannot write the figure"):
        loss_figure(result, tmp_path / "missing" / "f.png")
    with pytest.raises(RouterTuningError, match="ending in"):
        loss_figure(result, tmp_path / "f.nonsense")
    assert list(tmp_path.iterdir()) == []


def test_report_reads_no_model() -> None:
    from router_tuning import report

    for path in Path(report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {
                "torch",
                "peft",
                "transformers",
            }

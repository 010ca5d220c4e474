"""The tasks of `eval` as tables for a terminal: one for each kind of task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from router_tuning.report.curves import CURVES
from router_tuning.report.tables import fixed, numbers

Row = Mapping[str, Any]
HEADERS = {
    "choice": ("accuracy", "above chance", "gold, nats over dense"),
    "loss": ("loss", "nats over dense"),
    "generation": ("agreement", "same beginning", "repetition", "dense's loss"),
}


def task_tables(tasks: Mapping[str, Row]) -> list[Table]:
    """A table of each kind that there is; brackets hold 95 % confidence intervals."""
    return [
        _table(kind, found)
        for kind in HEADERS
        if (found := {name: task for name, task in tasks.items() if task["kind"] == kind})
    ]


def _table(kind: str, tasks: Mapping[str, Row]) -> Table:
    table = numbers(("task", "what", "budget", "kept", *HEADERS[kind]), first="left")
    for name, task in tasks.items():
        for what, row in _rows(task):
            budget = "" if row is task["dense"] else f"{row['budget']:g}"
            kept = fixed(row.get("kept_fraction", 1.0), 3)
            table.add_row(name, what, budget, kept, *_cells(kind, row))
        table.add_section()
    return table


def _rows(task: Row) -> Iterator[tuple[str, Row]]:
    yield "dense", task["dense"]
    for curve, label in CURVES.items():
        yield from ((label, row) for row in task.get(curve, ()))


def _cells(kind: str, row: Row) -> tuple[str, ...]:
    if kind == "choice":
        error = "" if row["stderr"] is None else f" ±{row['stderr']:.3f}"
        above = fixed(row["above_chance"], 3, sign=True)
        return f"{row['accuracy']:.3f}{error}", above, _interval(row.get("gold_difference"))
    if kind == "loss":
        return fixed(row["loss"], 4), _interval(row.get("loss_difference"))
    return (
        fixed(row["agreement"]["mean"], 3) if "agreement" in row else "",
        fixed(row["same_beginning"], 3) if "same_beginning" in row else "",
        fixed(row["repetition"], 3),
        fixed(row["loss_of_dense"], 3),
    )


def _interval(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return ""
    middle = fixed(value["mean"], 4, sign=True)
    if value["low"] is None:
        return middle
    return f"{middle} [{fixed(value['low'], 4, sign=True)}, {fixed(value['high'], 4, sign=True)}]"

"""Tables for a terminal, from the results of the verbs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from router_tuning.report.curves import CURVES, SPEED


def budget_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Calibrated budgets: what they keep, their threshold, and the held-out loss."""
    header = ("budget", "kept", "kept of routed", "threshold", "held-out loss", "over dense")
    table = numbers(header)
    for row in sorted(rows, key=lambda r: -float(r["budget"])):
        table.add_row(
            f"{row['budget']:g}",
            fixed(row["kept_fraction"], 3),
            fixed(row["kept_of_routed"], 3),
            fixed(row["threshold"], 3, sign=True),
            fixed(row.get("loss"), 4),
            fixed(row.get("loss_over_dense"), 4, sign=True),
        )
    return table


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """The JSON of `eval`: dense, routed, and the controls that it holds."""
    dense = result["dense"]
    header = ("what", "budget", "kept", "loss", "over dense", "answers", "FLOPs")
    table = numbers(header, first="left")
    answers = fixed(dense["answer_loss"], 4)
    table.add_row("dense", "", "1.000", fixed(dense["loss"], 4), "", answers, "1.000")
    for name, label in CURVES.items():
        rows: Iterable[Mapping[str, Any]] = result.get(name, ())
        if rows:
            table.add_section()
        for row in rows:
            table.add_row(
                label,
                f"{row['budget']:g}",
                fixed(row["kept_fraction"], 3),
                fixed(row["loss"], 4),
                fixed(row["loss"] - dense["loss"], 4, sign=True),
                fixed(row["answer_loss"], 4),
                fixed(row["flops_fraction"], 3),
            )
    return table


def export_table(result: Mapping[str, Any]) -> Table:
    """The JSON of `export`: the loss dense, routed, and without the blocks."""
    dense, exported = result["dense"]["loss"], result["exported"]
    table = numbers(("what", "layers", "parameters", "loss", "over dense"), first="left")
    for name, row, of in (
        ("dense", result["dense"], result),
        (f"routed, budget {result['budget']:g}", result["routed"], result),
        ("exported", exported, exported),
    ):
        over = fixed(row["loss"] - dense, 4, sign=True)
        cells = (str(of["layers"]), f"{of['parameters']:,}", fixed(row["loss"], 4))
        table.add_row(name, *cells, "" if row is result["dense"] else over)
    return table


def speed_table(result: Mapping[str, Any]) -> Table:
    """The JSON of `bench`: times over dense, and the share of the possible saving."""
    variants = [v for v in SPEED if v in result["cells"][0]["prefill"]["over_dense"]]
    header = ("rows", "prompt", "budget", "kept", "phase", *variants, "saved", "cache")
    table = numbers(header)
    for cell in result["cells"]:
        cache = cell["kv_bytes_counted"]
        for phase in ("prefill", "decode"):
            part = cell[phase]
            if part is None:
                continue
            saved = part["realised_saving"].get("routed")
            mark = "" if part["conclusive"] else "*"
            table.add_row(
                str(cell["batch_size"]),
                str(cell["prompt_tokens"]),
                "own" if cell["budget"] is None else f"{cell['budget']:g}",
                fixed(cell["kept_fraction"], 2),
                phase,
                *(fixed(part["over_dense"].get(name), 2) for name in variants),
                f"{fixed(saved, 2)}{mark}",
                fixed(cache["routed"] / cache["dense"], 2),
            )
        table.add_section()
    return table


def numbers(header: Sequence[str], first: str = "right") -> Table:
    """An empty table of numbers; the first column may stand to the left."""
    table = Table()
    for number, name in enumerate(header):
        left = number == 0 and first == "left"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def fixed(value: float | None, digits: int, sign: bool = False) -> str:
    """A number with so many decimals; a dash for None."""
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"

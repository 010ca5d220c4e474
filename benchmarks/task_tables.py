"""The tables of tasks, from files that `router-tuning eval --tasks --json` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from places import link, read

DECIDERS = {
    "routed": "routed",
    "static_greedy": "static, greedy",
    "static_cosine": "static, cosine",
    "random": "random",
}


def tasks(path: Path, root: str) -> str:
    """What was measured, and a table for each kind of task that there is."""
    document = read(path)
    run, found = document["run"], document["tasks"]
    about = (
        f"**Tasks, {path.stem.removeprefix('tasks-')}** ({run['device']}, {run['dtype']}; "
        f"{link(path, root)}). Accuracy with its standard error, and in nats a row, with its 95 % "
        "interval, by how much the gold answer is likelier than for the dense model, in itself and "
        "among the choices. The share above chance is of dense's, where that is above chance by "
        "three standard errors. Static dropping keeps what the routers kept of the same task:"
    )
    tables = (_choices(found), _losses(found), _generation(found))
    return "\n\n".join([about, *(table for table in tables if table)])


def _choices(found: dict[str, Any]) -> str:
    lines = [
        "| task (shots, rows) | what decides | budget | kept | accuracy | share above chance | "
        "gold answer | among the choices |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in found.items():
        if task["kind"] != "choice":
            continue
        dense = task["dense"]
        about = f"{name} ({task['shots']}, {dense['rows']})"
        lines.append(
            f"| {about} | dense; chance {dense['chance']:.3f} | - | 1.000 | {_accuracy(dense)} | - "
            "| - | - |"
        )
        lines += [f"| {about} | {label} | {_beside(row)} |" for label, row in _rows(task)]
    return "\n".join(lines) if len(lines) > 2 else ""


def _rows(task: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(label, row) for name, label in DECIDERS.items() for row in task.get(name, [])]


def _accuracy(one: dict[str, Any]) -> str:
    spread = "" if one["stderr"] is None else f" ± {one['stderr']:.3f}"
    return f"{one['accuracy']:.3f}{spread}"


def _beside(row: dict[str, Any]) -> str:
    share = row["share_above_chance"]
    cells = [f"{row['budget']:.2f}", f"{row['kept_fraction']:.3f}", _accuracy(row)]
    cells.append("-" if share is None else f"{share:.0%}")
    cells += [_interval(row[name]) for name in ("gold_difference", "among_choices_difference")]
    return " | ".join(cells)


def _interval(interval: dict[str, float | None], sign: str = "+") -> str:
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return " ".join((f"{mean:{sign}.3f}", f"({low:{sign}.3f} to {high:{sign}.3f})"))


def _losses(found: dict[str, Any]) -> str:
    lines = [
        "| loss of given answers | what decides | budget | kept | nats a token | over dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, task in found.items():
        if task["kind"] == "loss":
            lines.append(f"| {name} | dense | - | 1.000 | {task['dense']['loss']:.3f} | - |")
            lines += [
                f"| {name} | {label} | {row['budget']:.2f} | {row['kept_fraction']:.3f} | "
                f"{row['loss']:.3f} | {_interval(row['loss_difference'])} |"
                for label, row in _rows(task)
            ]
    return "\n".join(lines) if len(lines) > 2 else ""


def _generation(found: dict[str, Any]) -> str:
    lines = [
        "| greedy answers | what decides | budget | kept | agreement with dense | same beginning | "
        "repetition | dense's loss of them |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in found.items():
        if task["kind"] == "generation":
            dense = task["dense"]
            lines.append(
                f"| {name} | dense | - | 1.000 | - | - | {dense['repetition']:.3f} | "
                f"{dense['loss_of_dense']:.3f} |"
            )
            lines += [
                f"| {name} | {label} | {row['budget']:.2f} | {row['kept_fraction']:.3f} | "
                f"{_interval(row['agreement'], sign='')} | {row['same_beginning']:.3f} | "
                f"{row['repetition']:.3f} | {row['loss_of_dense']:.3f} |"
                for label, row in _rows(task)
            ]
    return "\n".join(lines) if len(lines) > 2 else ""

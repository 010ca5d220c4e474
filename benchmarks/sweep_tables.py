"""One adapter for many budgets: what tunings to several budgets, else alike, lose at each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from places import link, read
from quality_tables import KEPT, MEASURES, NAMES, Curve, Run, at, cell, curve

LEAST = 3
"""Budgets that a tuning was made to, below which there is nothing to compare."""


def swept(path: Path, root: str) -> str:
    """A table for each setting and seed that was tuned to several budgets by one recipe."""
    document = read(path)
    return "\n\n".join(_table(path, root, document, runs) for runs in _groups(document["runs"]))


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ by their budget alone, the largest budget first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        tuning = {name: value for name, value in run["tuning"].items() if name != "budget"}
        key = json.dumps([run["setting"], run["seed"], tuning], sort_keys=True)
        found.setdefault(key, []).append(run)
    several = [group for group in found.values() if len(_budgets(group)) >= LEAST]
    return [sorted(group, key=lambda run: -run["tuning"]["budget"]) for group in several]


def _budgets(runs: list[Run]) -> set[float]:
    return {run["tuning"]["budget"] for run in runs}


def _table(path: Path, root: str, document: dict[str, Any], runs: list[Run]) -> str:
    parts = [
        (text, measure)
        for text, base in document["dense"].items()
        for measure in MEASURES
        if base[measure] is not None
    ]
    columns = [f"{text}, {MEASURES[measure]}, {k:.2f}" for text, measure in parts for k in KEPT]
    curves = {
        run["tuning"]["budget"]: [
            curve(run["routed"][text], document["dense"][text], measure) for text, measure in parts
        ]
        for run in runs
    }
    lines = [
        f"**One adapter for many budgets: {document['run']['model']}, "
        f"{NAMES[runs[0]['setting']]}** (seed {runs[0]['seed']}; {link(path, root)}). Extra loss "
        "in nats a token at kept fractions, of adapters tuned to one budget each by the same "
        "recipe; at the end, by how much more the one tuned to the smallest loses than the one "
        "tuned to the kept fraction itself:",
        "",
        f"| tuned to | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for budget, of_parts in curves.items():
        cells = [cell([at(one, kept)]) for one in of_parts for kept in KEPT]
        lines.append(f"| {budget:.2f} | {' | '.join(cells)} |")
    smallest = curves[min(curves)]
    more = [
        cell([_more(smallest[part], curves.get(kept, [None] * len(parts))[part], kept)])
        for part in range(len(parts))
        for kept in KEPT
    ]
    return "\n".join(
        [*lines, f"| {min(curves):.2f}, over that tuned for it | {' | '.join(more)} |"]
    )


def _more(swept_one: Curve, tuned: Curve | None, kept: float) -> float | None:
    values = at(swept_one, kept), None if tuned is None else at(tuned, kept)
    return None if values[0] is None or values[1] is None else values[0] - values[1]

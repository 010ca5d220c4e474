"""The table of what else could be done, from the file that `screen.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quality_tables
from places import link, read
from screen import RECIPE

KEPT = (0.9, 0.85, 0.8)


def screened(path: Path, root: str) -> str:
    """What each candidate loses, and what of it is more than the recipe's."""
    document = read(path)
    run, runs, measures = document["run"], document["runs"], _measures(document)
    tuning = runs[0]["tuning"]
    setting = quality_tables.NAMES[runs[0]["setting"]]
    columns = [f"{label}, {kept:.2f}" for label, _, _ in measures for kept in KEPT]
    lines = [
        f"**What else could be done, on {run['model']}** ({setting}; {tuning['train_tokens']:,} "
        f"tokens of training unless the name says otherwise; {run['report_windows']} windows of "
        f"each text; {link(path, root)}). Extra loss in nats a token over the untouched model: of "
        "the recipe the mean and standard deviation over its seeds, of each candidate the loss "
        "with its first seed, and in brackets how much more that is than the recipe's with the "
        "same seed:",
        "",
        f"| candidate | {' | '.join(columns)} | trained numbers | seconds |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for name in dict.fromkeys(one["candidate"] for one in runs):
        lines.append(f"| {name} | {' | '.join(_cells(document, name))} |")
    for kind in quality_tables.STATICS:
        curves = [
            quality_tables.statics(document, text, measure).get(kind)
            for _, text, measure in measures
        ]
        if all(curves):
            lost = [_shown(quality_tables.at(c, kept)) for c in curves if c for kept in KEPT]
            lines.append(f"| static drop, {kind} | {' | '.join(lost)} | - | - |")
    return "\n".join(lines)


def _measures(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, text and field of everything that was measured."""
    return [
        (f"{text}, {quality_tables.MEASURES[measure]}", text, measure)
        for text, base in document["dense"].items()
        for measure in quality_tables.MEASURES
        if base[measure] is not None
    ]


def _cells(document: dict[str, Any], name: str) -> list[str]:
    runs = [one for one in document["runs"] if one["candidate"] == name]
    recipes = [one for one in document["runs"] if one["candidate"] == RECIPE]
    beside = next((one for one in recipes if one["seed"] == runs[0]["seed"]), None)
    cells = []
    for _, text, measure in _measures(document):
        for kept in KEPT:
            lost = [_lost(document, one, text, measure, kept) for one in runs]
            if name == RECIPE:
                cells.append(quality_tables.cell(lost))
            else:
                recipe = beside and _lost(document, beside, text, measure, kept)
                cells.append(_beside(lost[0], recipe))
    trainable, seconds = runs[0].get("trainable"), runs[0].get("tuning_seconds")
    cells.append("-" if trainable is None else f"{trainable:,}")
    return [*cells, "-" if seconds is None else f"{seconds:.0f}"]


def _lost(
    document: dict[str, Any], one: dict[str, Any], text: str, measure: str, kept: float
) -> float | None:
    base = document["dense"][text]
    return quality_tables.at(quality_tables.curve(one["routed"][text], base, measure), kept)


def _beside(lost: float | None, recipe: float | None) -> str:
    if lost is None or recipe is None:
        return _shown(lost)
    return f"{lost:+.3f} ({lost - recipe:+.3f})"


def _shown(lost: float | None) -> str:
    return "-" if lost is None else f"{lost:+.3f}"

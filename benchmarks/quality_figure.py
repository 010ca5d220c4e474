"""A figure of loss against kept fraction: one recipe of each setting, beside its controls.

Run by fill_tables.py. A line is the mean over seeds, a band from their least to their most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quality_tables
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from places import read

STYLES = {
    "all": ('token, kv="all"', "#0b5fa5", "o"),
    "kept_window": ('token, kv="kept", 20 keys of sink and window', "#b5541c", "s"),
    "kept": ('token, kv="kept"', "#7a4fa3", "D"),
    "sequence": ("once a sequence", "#c2417c", "P"),
    "mlp_token": ("MLPs, token", "#0b5fa5", "o"),
    "cosine": ("static, cosine", "#5b7f2b", "v"),
    "greedy": ("static, greedy", "#8a8a8a", "^"),
    "random": ("random", "#c98a00", "x"),
}
PANELS = (
    ("alpaca", "loss", "Alpaca, all tokens"),
    ("alpaca", "answer_loss", "Alpaca, answers"),
    ("wikitext", "loss", "WikiText-2, not tuned on"),
)
GRID = [1 - step / 100 for step in range(41)]
MOST = 0.5
"""Nats at the top of a panel."""


def draw(
    result: Path,
    path: Path,
    panels: Sequence[tuple[str, str, str]] = PANELS,
    *,
    random: bool = False,
) -> None:
    """Draw a result of quality.py into a file whose ending names its format. A panel is a text, a
    measure and a title; `random` adds the random masks.
    """
    document = read(result)
    if not random:
        document.pop("random", None)
    figure = Figure(figsize=(max(3.7 * len(panels), 6), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (text, measure, title) in zip(places, panels, strict=True):
        for name, lines in curves(document, text, measure).items():
            _line(axes, name, lines)
        axes.axhline(0, color="#1a1a1a", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set(xlim=(1.0, 0.6), ylim=(-0.12, MOST), title=title, xlabel="kept fraction")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss over dense (nats a token)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curves(document: Any, text: str, measure: str) -> dict[str, list[quality_tables.Curve]]:
    """What the figure has of a text: who decides -> a curve for each seed."""
    base = document["dense"][text]
    newest = quality_tables.newest_of(document["runs"])
    found = {
        setting: [
            quality_tables.curve(run["routed"][text], base, measure)
            for run in newest[setting, False, False]
        ]
        for setting in STYLES
        if (setting, False, False) in newest
    }
    statics = quality_tables.statics(document, text, measure)
    found |= {kind: [curve] for kind, curve in statics.items()}
    if "random" in document:
        found["random"] = [quality_tables.curve(document["random"][text], base, measure)]
    return found


def _line(axes: Any, name: str, lines: list[quality_tables.Curve]) -> None:
    """Where all seeds reach."""
    label, colour, marker = STYLES[name]
    rows = [(kept, [quality_tables.at(curve, kept) for curve in lines]) for kept in GRID]
    known = [(kept, [v for v in values if v is not None]) for kept, values in rows]
    known = [(kept, values) for kept, values in known if len(values) == len(lines)]
    kept = [k for k, _ in known]
    means = [sum(values) / len(values) for _, values in known]
    axes.plot(kept, means, color=colour, marker=marker, markevery=5, markersize=5, label=label)
    if len(lines) > 1:
        low, high = ([pick(values) for _, values in known] for pick in (min, max))
        axes.fill_between(kept, low, high, color=colour, alpha=0.18, linewidth=0)

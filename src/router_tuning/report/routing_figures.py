"""A figure from the JSON of `analyse`: which units run in which domain, and for which tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_tuning.report.figures import FAINT, INK, MARKERS, SHADES, save_figure
from router_tuning.report.routing_tables import GROUPS, counted, mean_kept, routed_models

LEAST_HEIGHT = 7.2
ROW = 0.2
"""Inches of a unit's row."""
COLUMN = 0.34
"""Inches of a domain's column."""
BARS = 5.4
"""Inches of the panel of bars, its labels included."""


def routing_figure(result: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draw the kept fraction of each unit in each domain, a map for each adapter (and for the
    start), and beside them of each group of tokens: the mean over adapters as a bar, each adapter
    as a mark.

    Returns the path. The file's ending names its format.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models, domains = routed_models(result), list(result["text"])
    units = list(models[0]["all"]["kept_per_unit"])
    maps = [0.5 + COLUMN * len(domains)] * len(models)
    size = (sum(maps) + 1.2 + BARS, max(LEAST_HEIGHT, 1.6 + ROW * len(units)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[sum(maps) + 1.2, BARS])[0]
    panels = left.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        image = _map(axes, model, units, domains)
        axes.set_title(model["name"], fontsize=9, color=INK)
    panels[0].set_yticks(range(len(units)), [_unit(name) for name in units], fontsize=7)
    bar = left.colorbar(image, ax=list(panels), location="bottom", fraction=0.03, aspect=30)
    bar.set_label("kept fraction of the tokens", fontsize=9)
    _bars(right.subplots(), result)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, Path(path))


def _unit(name: str) -> str:
    """`layers.3.attn` as people say it."""
    _, layer, kind = name.split(".")
    return f"{kind} {layer}"


def _map(axes: Any, model: Mapping[str, Any], units: Sequence[str], domains: Sequence[str]) -> Any:
    kept = [
        [model["domains"][domain]["kept_per_unit"][unit] for domain in domains] for unit in units
    ]
    image = axes.imshow(kept, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(domains)), domains, rotation=90, fontsize=8)
    axes.tick_params(length=0)
    return image


def _bars(axes: Any, result: Mapping[str, Any]) -> None:
    """A block of bars for each grouping, one below the other."""
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for what, label in GROUPS.items():
        axes.text(0, y, f" {label}", fontsize=9, fontweight="bold", color=INK, va="center")
        for name, tokens in counted(result, what):
            y += 1
            ticks.append((y, f"{name} ({tokens:,})"))
            axes.barh(y, mean_kept(result, what, name), height=0.72, color="#9ecae1", zorder=2)
            _marks(axes, result, what, name, y)
        y += 1.6
    mean = result["adapters"][0]["all"]["kept_of_routed"]
    axes.axvline(mean, color=FAINT, linewidth=1, zorder=1, label="all tokens")
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axes.set_ylim(y - 0.8, -0.8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("kept fraction of the routed units (number of tokens in brackets)", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    axes.figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )


def _marks(axes: Any, result: Mapping[str, Any], what: str, name: str, y: float) -> None:
    models = routed_models(result)
    for index, model in enumerate(models):
        kept = model["groups"][what][name]["kept_of_routed"]
        apart = 0.5 * (index + 0.5) / len(models) - 0.25  # so that equal ones can be told apart
        is_start = model is result["start"]
        style = {
            "marker": "x" if is_start else MARKERS[index % len(MARKERS)],
            "color": "#b5541c" if is_start else SHADES[index % 3],
        }
        axes.scatter([kept], [y + apart], s=18, zorder=3, label=model["name"], **style)

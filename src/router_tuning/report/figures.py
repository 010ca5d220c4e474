"""Figures from the JSON of `eval` and `bench`, drawn with matplotlib's Agg on any machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_tuning.errors import RouterTuningError
from router_tuning.report.curves import CURVES, SPEED

INK = "#1a1a1a"
FAINT = "#8a8a8a"
# Told apart by colour, marker and label, so that they survive a grey printer and colour blindness.
STYLES: dict[str, dict[str, Any]] = {
    "routed": {"color": "#0b5fa5", "marker": "o", "linewidth": 2.4, "markersize": 6, "zorder": 5},
    "random": {"color": "#b5541c", "marker": "^"},
    "random_uniform": {"color": "#c98a00", "marker": "v"},
    "static_cosine": {"color": "#5b7f2b", "marker": "s"},
    "static_greedy": {"color": "#7a4fa3", "marker": "D"},
    "learned_static": {"color": "#4d4d4d", "marker": "P"},
}
DOTS: dict[str, dict[str, Any]] = {
    "routed": {"color": "#0b5fa5", "marker": "o", "s": 64, "zorder": 5},
    "random": {"color": "#b5541c", "marker": "^"},
    "static": {"color": "#5b7f2b", "marker": "s"},
    "floor": {"color": FAINT, "marker": "|", "s": 90},
    "all_kept": {"color": "#7a4fa3", "marker": "D"},
    "masked": {"color": "#4d4d4d", "marker": "X"},
}
SHADES = ("#08306b", "#0b5fa5", "#4292c6", "#9ecae1", "#7f7f7f")
"""For lines in order: few kept tokens dark, many light."""
MARKERS = "osD^vP"
LABEL_ROOM = 0.055
"""Least distance of two labels, as a part of the axis' height."""


def loss_figure(result: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draw the loss over dense against the kept fraction, a curve for each control.

    Returns the path. All curves meet the dense model at a kept fraction of 1. The file's ending
    names its format.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[tuple[float, float, str, str]] = []
    for name, label in CURVES.items():
        points = curve(result, name)
        if len(points) < 2:
            continue
        kept, over = zip(*points, strict=True)
        style: dict[str, Any] = {"linewidth": 1.6, "markersize": 5, **STYLES[name]}
        axes.plot(kept, over, label=label, **style)
        ends.append((kept[0], over[0], label, style["color"]))
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _frame(axes, result, title)
    _label(axes, ends)
    return save_figure(figure, Path(path))


def curve(result: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Points (kept fraction, loss over dense) of a control, the dense model as the last one."""
    base = float(result["dense"]["loss"])
    rows = result.get(name) or []
    points = {
        float(row["kept_fraction"]): float(row["loss"]) - base
        for row in rows
        if row["loss"] is not None
    }
    return sorted({**points, 1.0: 0.0}.items()) if points else []


def speed_figure(result: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draw the time over dense of each variant: a line for each cell, a panel for each phase. The
    ring is the ideal: the floor and the work that the decisions leave.

    Returns the path.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = result["cells"]
    phases = [p for p in ("prefill", "decode") if any(cell[p] is not None for cell in cells)]
    figure = Figure(figsize=(9.2, 1.6 + 0.34 * len(cells)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=True):
        _dots(axes, cells, phase)
        axes.set_title(f"{phase}: time over dense", loc="left", fontsize=10, color=INK)
    panels[0].set_yticks(range(len(cells)), [_cell_name(cell) for cell in cells], fontsize=9)
    panels[0].set_ylim(len(cells) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, Path(path))


def growth_figure(result: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draw the routed time over dense against the prompt's length: a line for each budget, a column
    of panels for each number of rows.

    Returns the path.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = result["cells"]
    phases = [p for p in ("prefill", "decode") if any(cell[p] is not None for cell in cells)]
    rows = sorted({cell["batch_size"] for cell in cells})
    figure = Figure(figsize=(2.0 + 2.4 * len(rows), 1.2 + 2.4 * len(phases)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(phases), len(rows), sharex=True, sharey=True, squeeze=False)
    for line, phase in zip(panels, phases, strict=True):
        for axes, number in zip(line, rows, strict=True):
            _growth(axes, [c for c in cells if c["batch_size"] == number and c[phase]], phase)
            axes.set_title(f"{phase}, {number} row{'s' * (number > 1)}", loc="left", fontsize=10)
        line[0].set_ylabel("time over dense")
    for axes in panels[-1]:
        axes.set_xlabel("prompt tokens")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, Path(path))


def _growth(axes: Any, cells: Sequence[Mapping[str, Any]], phase: str) -> None:
    budgets = sorted({cell["budget"] for cell in cells}, key=lambda b: -1.0 if b is None else b)
    for index, budget in enumerate(budgets):
        points = sorted(
            (cell["prompt_tokens"], cell[phase]["over_dense"]["routed"])
            for cell in cells
            if cell["budget"] == budget and "routed" in cell[phase]["over_dense"]
        )
        if points:
            label = "own threshold" if budget is None else f"budget {budget:g}"
            colour, marker = SHADES[index % len(SHADES)], MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:g}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_ylim(bottom=0)


def _cell_name(cell: Mapping[str, Any]) -> str:
    return f"{cell['batch_size']} x {cell['prompt_tokens']}, kept {cell['kept_fraction']:.2f}"


def _dots(axes: Any, cells: Sequence[Mapping[str, Any]], phase: str) -> None:
    rows = [(y, cell[phase]) for y, cell in enumerate(cells) if cell[phase] is not None]
    for name, label in SPEED.items():
        points = [(p["over_dense"][name], y) for y, p in rows if name in p["over_dense"]]
        if points:
            style: dict[str, Any] = {"s": 36, **DOTS[name]}
            axes.scatter(*zip(*points, strict=True), label=label, **style)
    ideal = [(p["ideal_seconds"] / p["seconds"]["dense"]["median"], y) for y, p in rows]
    ring = {"facecolors": "none", "edgecolors": INK, "marker": "o", "s": 110, "zorder": 6}
    axes.scatter(*zip(*ideal, strict=True), label="ideal", **ring)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)


def _frame(axes: Any, result: Mapping[str, Any], title: str) -> None:
    axes.set_xlabel("kept fraction of the routed kinds of units")
    axes.set_ylabel("loss over dense (nats a token)")
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    low, high = axes.get_xlim()
    # Room at the left for the labels of the curves.
    axes.set_xlim(low - 0.3 * (high - low), high + 0.02 * (high - low))
    ticks = [t for t in axes.get_xticks() if low <= t <= 1.0]
    axes.set_xticks(ticks)
    dense = f"dense, {result['dense']['loss']:.3f}"
    axes.annotate(
        dense,
        (axes.get_xlim()[0], 0),
        xytext=(2, 4),
        textcoords="offset points",
        color=FAINT,
        fontsize=9,
    )


def _label(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each curve's name left of its end, moved up where two would touch."""
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    least = LABEL_ROOM * (top - bottom)
    edge = min((end[0] for end in ends), default=0.0) - 0.025 * (right - left)
    height = bottom + 1.6 * least  # above the dense line's own label
    for kept, over, label, color in sorted(ends, key=lambda end: end[1]):
        height = max(over, height)
        axes.annotate(
            label,
            (kept, over),
            xytext=(edge, height),
            textcoords="data",
            ha="right",
            va="center",
            color=color,
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (1, 0.5),
            },
        )
        height += least


def save_figure(figure: Any, path: Path) -> Path:
    """Write under a temporary name, then rename.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    handle = None
    try:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
        try:
            figure.savefig(temporary, dpi=160)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, ValueError) as error:  # ValueError: an ending that names no format
        raise RouterTuningError(
            f"cannot write the figure {path}: {error}; wanted a writable folder and a name "
            f"ending in .png, .svg or .pdf"
        ) from error
    return path

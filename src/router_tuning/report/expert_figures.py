"""A figure from the part "experts" of the JSON of `analyse`: assigned against executed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_tuning.report.figures import FAINT, INK, save_figure

ASSIGNED, EXECUTED = "#9ecae1", "#0b5fa5"
PANEL = 1.5
"""Inches of a layer's panel."""
LEAST_WIDTH, EXPERT = 6.4, 0.13
"""Inches of the figure, and of an expert in it."""


def expert_figure(experts: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draw the load of each expert, a panel a layer: what is assigned to it as a bar, what it
    executes of that as a bar in front, and what the dense model assigns to it as a line. A load of
    1 is an even share of all assigned tokens. Bars are means over adapters, with a mark for what
    each one executes where there are several.

    Returns the path. The file's ending names its format.

    Raises:
        RouterTuningError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense = experts["dense"]
    most = max(len(layer["assigned"]["load"]) for layer in dense)
    size = (max(LEAST_WIDTH, 1.2 + EXPERT * most), 0.9 + PANEL * len(dense))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(dense), 1, sharex=True, squeeze=False)[:, 0]
    for place, (axes, layer) in enumerate(zip(panels, dense, strict=True)):
        routed = [adapter["layers"][place] for adapter in experts["adapters"]]
        _panel(axes, layer, routed)
    panels[-1].set_xlabel("expert", fontsize=9)
    figure.supylabel("load (1: an even share)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, Path(path))


def _panel(axes: Any, dense: Mapping[str, Any], routed: list[Mapping[str, Any]]) -> None:
    number = range(len(dense["assigned"]["load"]))
    for what, colour in (("assigned", ASSIGNED), ("executed", EXECUTED)):
        loads = [layer[what]["load"] for layer in routed]
        mean = [sum(of) / len(of) for of in zip(*loads, strict=True)]
        axes.bar(number, mean, width=0.84, color=colour, label=what, zorder=2)
    if len(routed) > 1:
        for layer in routed:
            axes.plot(number, layer["executed"]["load"], ".", color=INK, markersize=2, zorder=4)
    edges = [-0.5, *(expert + 0.5 for expert in number)]
    axes.stairs(
        dense["assigned"]["load"], edges, color="#b5541c", label="assigned, dense", zorder=3
    )
    axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(f"layer {dense['layer']}", loc="left", fontsize=9, color=INK)
    axes.set_xlim(-1, len(number))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

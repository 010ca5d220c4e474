"""What a loss costs: losses of quality.py against what bench measured of the same setting.

A setting's losses are known at kept fractions, and so is what it costs: in FLOPs, in time, in bytes
of the cache. Read at the same kept fraction, the two give a curve. Run by fill_tables.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality_figure
import quality_tables
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from places import RESULTS, link, read
from quality_tables import Curve
from speed_tables import instructions

COSTS: dict[str, Callable[[dict[str, Any], str], float]] = {
    "FLOPs of a prompt": lambda cell, who: _flops(cell, who),
    "time of a prompt": lambda cell, who: cell["prefill"]["over_dense"][who],
    "time of a new token": lambda cell, who: cell["decode"]["over_dense"][who],
    "bytes of the cache": lambda cell, who: _cache(cell, who),
}
"""Over the dense model's."""
TEXTS = (("alpaca", "answer_loss", "Alpaca, answers"), ("wikitext", "loss", "WikiText-2"))
STATIC = "kept"
"""The setting beside whose routers static dropping was timed: it leaves the keys out too."""
KEPT = (0.9, 0.8, 0.75)


def files(model: str) -> dict[str, Path]:
    """What was timed of a model: setting -> a file that `router-tuning bench` wrote."""
    paths = {
        setting: RESULTS / f"pareto-{model}-{setting}.json" for setting in quality_tables.NAMES
    }
    return {setting: path for setting, path in paths.items() if path.exists()}


def draw(model: str, path: Path) -> None:
    """Draw extra loss against each cost: a row of panels for each text."""
    figure = Figure(figsize=(3.4 * len(COSTS), 3.1 * len(TEXTS)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(TEXTS), len(COSTS), sharey="row", sharex="col", squeeze=False)
    costs = _costs(model)
    for row, (text, measure, title) in zip(panels, TEXTS, strict=True):
        losses = _losses(model, text, measure)
        for axes, name in zip(row, COSTS, strict=True):
            for who, of in losses.items():
                points = _paired(costs[who][name], of) if who in costs else []
                if points:
                    label, colour, marker = quality_figure.STYLES[who]
                    style = {"color": colour, "marker": marker, "markevery": 5, "markersize": 5}
                    axes.plot(*zip(*points, strict=True), label=label, **style)
            axes.set_ylim(-0.12, quality_figure.MOST)
            axes.axhline(0, color="#1a1a1a", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{title}:\nloss over dense (nats)")
    for axes, name in zip(panels[-1], COSTS, strict=True):
        axes.set_xlabel(f"{name}, of dense's")
        axes.invert_xaxis()  # of the whole column: what costs less stands to the right
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def table(model: str, root: str) -> str:
    """Costs and extra losses at a few kept fractions."""
    found = files(model)
    first = read(next(iter(found.values())))
    cell, run = first["cells"][0], first["run"]
    sources = ", ".join(link(path, root) for path in found.values())
    lines = [
        f"**What a loss costs: {model}** (losses of {link(_quality(model), root)}; costs at "
        f"{cell['batch_size']} x {cell['prompt_tokens']} + {cell['new_tokens']}, {run['device']}, "
        f"{run['dtype']}, {run['threads']} threads{instructions(run)}, {sources}). "
        "Each over the dense model's, at exactly the kept fraction of the attentions; losses in "
        "nats a token over dense:",
        "",
        f"![{model}: loss against what it costs]({root}docs/figures/pareto-{model}.png)",
        "",
        f"| what decides | kept | {' | '.join(COSTS)} | "
        f"{' | '.join(title for *_, title in TEXTS)} |",
        "|---|---|" + "---|" * (len(COSTS) + len(TEXTS)),
    ]
    costs = _costs(model)
    losses = [_losses(model, text, measure) for text, measure, _ in TEXTS]
    for who in (who for who in costs if who in losses[0]):
        for kept in KEPT:
            of = [_told(quality_tables.at(costs[who][name], kept), "") for name in COSTS]
            lost = [_told(quality_tables.at(known[who], kept), "+") for known in losses]
            name = quality_figure.STYLES[who][0]
            lines.append(f"| {name} | {kept:.2f} | {' | '.join([*of, *lost])} |")
    return "\n".join(lines)


def _told(value: float | None, sign: str) -> str:
    return "-" if value is None else f"{value:{sign}.{3 if sign else 2}f}"


def _quality(model: str) -> Path:
    return RESULTS / f"quality-{model}.json"


def _costs(model: str) -> dict[str, dict[str, Curve]]:
    """Who decides -> cost -> points (kept fraction, cost over dense)."""
    found = {}
    for setting, path in files(model).items():
        cells = read(path)["cells"]
        found[setting] = _by_cost([(cell["kept_of_routed"], cell) for cell in cells], "routed")
        if setting == STATIC:
            at = [(_cache(cell, "static"), cell) for cell in cells]
            found |= {kind: _by_cost(at, "static") for kind in quality_tables.STATICS}
    return found


def _by_cost(cells: list[tuple[float, dict[str, Any]]], who: str) -> dict[str, Curve]:
    return {
        name: sorted([*((kept, of(cell, who)) for kept, cell in cells), (1.0, 1.0)])
        for name, of in COSTS.items()
    }


def _flops(cell: dict[str, Any], who: str) -> float:
    fraction: dict[str, float] = cell["prefill"]["flops_fraction"]
    if who == "routed":
        return fraction["routed"]
    # Attentions of one model cost the same.
    return fraction["floor"] + (1 - fraction["floor"]) * _cache(cell, who)


def _cache(cell: dict[str, Any], who: str) -> float:
    memory = cell["memory"]
    return float(memory[who]["kv_bytes"] / memory["dense"]["kv_bytes"])


def _losses(model: str, text: str, measure: str) -> dict[str, Curve]:
    """Who decides -> points (kept fraction, mean extra loss over seeds)."""
    curves = quality_figure.curves(read(_quality(model)), text, measure)
    return {who: _mean(of) for who, of in curves.items()}


def _mean(curves: list[Curve]) -> Curve:
    """Where all reach."""
    points = [(kept, [quality_tables.at(c, kept) for c in curves]) for kept in quality_figure.GRID]
    known = [(kept, [v for v in values if v is not None]) for kept, values in points]
    return sorted((kept, sum(v) / len(v)) for kept, v in known if len(v) == len(curves))


def _paired(cost: Curve, loss: Curve) -> Curve:
    """Points (cost, loss) at the same kept fraction, from the dense model on."""
    at = [(quality_tables.at(cost, kept), value) for kept, value in reversed(loss)]
    return [(of, value) for of, value in at if of is not None]

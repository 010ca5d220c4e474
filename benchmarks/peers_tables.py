"""The table of what others train, from the file that `peers_quality.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quality_tables
from places import link, read

from router_tuning.report.tables import fixed

KEPT = (0.9, 0.8, 0.7)
NAMES = {
    "routers": "our routers",
    "mod_topk": "mixture of depths, top-k",
    "mod_threshold": "mixture of depths, thresholds",
    "official": "the paper's recipe as its code has it",
    "official_hinge": "the same with the paper's hinge",
}


def trained(path: Path, root: str) -> str:
    """Extra loss over the untouched model on each text, and what each training took."""
    document = read(path)
    run, runs, texts = document["run"], document["runs"], list(document["dense"])
    tuning = runs[0]["tuning"]
    at = ("all kept", *(f"{kept:.2f}" for kept in KEPT))
    columns = [f"{text}, {which}" for text in texts for which in at]
    lines = [
        f'**What others train, on {run["model"]}** (attention, `kv="{tuning["kv"]}"`, '
        f"{run['device']}, trained in {tuning['dtype']} by {runs[0]['threads']} threads; "
        f"{link(path, root)}). Extra loss in nats a token over the untouched model, over answers "
        "where a text has some; all weights were trained for as many steps as the routers, and for "
        "several times their time:",
        "",
        f"| what trains | seed | steps | tokens | seconds | GB | trained numbers | "
        f"{' | '.join(columns)} |",
        "|" + "---|" * (7 + len(columns)),
    ]
    lines += [_row(document, one) for one in _in_order(runs)]
    for kind in quality_tables.STATICS:
        rows = {text: document["static"][text].get(kind) for text in texts}
        if all(rows.values()):
            lost = [
                cell
                for text, dense in document["dense"].items()
                for cell in ("-", *_swept(dense, rows[text]))
            ]
            lines.append(f"| static drop, {kind}{' | -' * 6} | {' | '.join(lost)} |")
    return "\n".join(lines)


def _in_order(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda one: list(NAMES).index(one["method"]))


def _row(document: dict[str, Any], one: dict[str, Any]) -> str:
    times = one["tuning"].get("times")
    cells = [
        NAMES[one["method"]] + (f", {times:g} x the time" if times else ""),
        str(one["seed"]),
        str(one["steps"]),
        f"{one['train_tokens']:,}",
        fixed(one["seconds"], 0),
        "-" if one["peak_bytes"] is None else fixed(one["peak_bytes"] / 1e9, 1),
        f"{one['trainable']:,}",
    ]
    for text, dense in document["dense"].items():
        whole = one["everything_kept"][text][_measure(dense)] - dense[_measure(dense)]
        cells += [f"{whole:+.3f}", *_swept(dense, one["routed"][text], whole)]
    return f"| {' | '.join(cells)} |"


def _swept(dense: dict[str, Any], rows: list[dict[str, Any]], whole: float = 0.0) -> list[str]:
    """At each kept fraction; `whole` is what is lost with everything kept."""
    measure = _measure(dense)
    points = [(row["kept_fraction"], row[measure] - dense[measure]) for row in rows]
    curve = sorted([*points, (1.0, whole)])
    found = [quality_tables.at(curve, kept) for kept in KEPT]
    return ["-" if value is None else f"{value:+.3f}" for value in found]


def _measure(dense: dict[str, Any]) -> str:
    return "loss" if dense["answer_loss"] is None else "answer_loss"

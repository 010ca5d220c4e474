"""Tables of a routed mixture of experts, from the file that `mixture.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quality_tables
from places import link, read

from router_tuning.report.expert_tables import STABILITY, executed_fractions
from router_tuning.report.tables import fixed

KEPT = (0.9, 0.75)


def mixture(path: Path, root: str) -> list[str]:
    """What was trained, loss against kept fraction, and what the experts execute."""
    document = read(path)
    return [
        _made(document, path, root),
        quality_tables.everything(path, root),
        _controls(document),
        f"![loss against kept fraction](figures/quality-{path.stem}.png)",
        _experts(document),
        f"![tokens assigned and executed by expert](figures/experts-{path.stem}.png)",
        _stability(document),
    ]


def _made(document: dict[str, Any], path: Path, root: str) -> str:
    made = document["pretraining"]
    text = ", ".join(name.rpartition(".")[0] or name for name in made["text"])
    return (
        f"**A mixture of experts from scratch** ({link(path, root)}): {made['layers']} layers, "
        f"hidden size {made['hidden']}, {made['experts']} experts of which a token meets "
        f"{made['experts_per_token']}, {made['parameters']:,} parameters of which a token meets "
        f"{made['active_parameters']:,}; trained on {made['tokens']:,} tokens of {text} in "
        f"{made['cpu_seconds'] / 60:.0f} CPU minutes. Its MLPs are routed."
    )


def _controls(document: dict[str, Any]) -> str:
    """One seed beside all controls, chance among them."""
    texts = list(document["dense"])
    columns = [f"{text}, {kept:.2f}" for text in texts for kept in KEPT]
    lines = [
        "One seed beside the controls, extra loss in nats a token:",
        "",
        _row(["what decides", *columns]),
        "|" + "---|" * (len(columns) + 1),
    ]
    for label, _, curves in quality_tables.deciders(document, texts):
        found = (quality_tables.at(curves[text], kept) for text in texts for kept in KEPT)
        lines.append(_row([label, *(fixed(value, 3, sign=True) for value in found)]))
    return "\n".join(lines)


def _experts(document: dict[str, Any]) -> str:
    experts = document["experts"]
    lines = [
        f"Experts, at {experts['budget']:g} of the executions (means over "
        f"{len(experts['adapters'])} seeds; of the dense model in brackets): what each layer "
        "executes, of all and of the expert with the least and the most; the largest load, "
        "entropy and specialisation of what is executed:",
        "",
        _row(["layer", "executed", "least, most", "largest load", "entropy", "specialisation"]),
        "|" + "---|" * 6,
    ]
    for place, dense in enumerate(experts["dense"]):
        layers = [adapter["layers"][place] for adapter in experts["adapters"]]
        ends = [_mean(pick(executed_fractions(of)) for of in layers) for pick in (min, max)]
        measures = [
            f"{fixed(_mean(measure(of['executed']) for of in layers), digits)} "
            f"({fixed(measure(dense['assigned']), digits)})"
            for measure, digits in MEASURES
        ]
        executed = fixed(_mean(of["executed_fraction"] for of in layers), 3)
        least_most = ", ".join(fixed(end, 2) for end in ends)
        lines.append(_row([str(dense["layer"]), executed, least_most, *measures]))
    return "\n".join(lines)


MEASURES: tuple[tuple[Any, int], ...] = (
    (lambda of: max(of["load"]), 2),
    (lambda of: of["entropy"], 3),
    (lambda of: of["specialisation"], 3),
)


def _stability(document: dict[str, Any]) -> str:
    lines = [
        "Executed fractions of experts, correlation of two seeds:",
        "",
        _row(["of", *STABILITY.values()]),
        "|" + "---|" * (1 + len(STABILITY)),
    ]
    for pair in document["experts"]["pairs"]:
        cells = [fixed(pair[name], 3) for name in STABILITY]
        lines.append(_row([f"{pair['a']}, {pair['b']}", *cells]))
    return "\n".join(lines)


def _mean(values: Any) -> float | None:
    """None where one of them is."""
    found = list(values)
    return None if None in found else sum(found) / len(found)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

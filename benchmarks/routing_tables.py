"""Tables and a figure of which layers and tokens skip, from the JSON of `analyse`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from places import link, read

from router_tuning.report.routing_figures import routing_figure
from router_tuning.report.routing_tables import AGREEMENT, GROUPS, counted, routed_models
from router_tuning.report.tables import fixed


def routing(path: Path, root: str) -> list[str]:
    """Everything about one model."""
    found = read(path)
    return [
        _by_domain(found, path, root),
        f"![{found['model']}: what is kept, by layer and by token]({_figure(path)})",
        _by_group(found),
        _stability(found),
    ]


def draw(path: Path, folder: Path) -> None:
    """The figure that the tables stand beside."""
    found = read(path)
    title = f"{found['model']}, kept {found['budget']:g}"
    routing_figure(found, folder / Path(_figure(path)).name, title)


def _figure(path: Path) -> str:
    return f"figures/{path.stem.replace('routing-analysis', 'routing')}.png"


def _by_domain(found: dict[str, Any], path: Path, root: str) -> str:
    run, domains = found["run"], list(found["text"])
    text = ", ".join(f"{name} {part['tokens']}" for name, part in found["text"].items())
    kv = found["adapters"][0]["kv"]
    lines = [
        f'**Which layers and tokens skip: {found["model"]}**, `kv="{kv}"`, at '
        f"{found['budget']:g} of all this text ({run['device']}, {run['dtype']}; "
        f"{link(path, root)}; tokens: {text}). The kept fraction of each domain, and the parts of "
        "the decisions' variance; in brackets what would lie between tokens by chance; how many "
        "units run for nearly all and nearly no tokens:",
        "",
        _row(["adapter", *domains, "between layers", "between tokens", "rest", "always, never"]),
        _rule(len(domains) + 5),
    ]
    for model in routed_models(found):
        parts, settled = model["all"]["variance"], model["all"]["settled_units"]
        kept = [fixed(model["domains"][name]["kept_fraction"], 3) for name in domains]
        chance = fixed(parts["tokens_by_chance"], 3)
        variance = [
            fixed(parts["units"], 2),
            f"{fixed(parts['tokens'], 3)} ({chance})",
            fixed(parts["rest"], 2),
        ]
        ends = f"{settled['always']}, {settled['never']} of {len(model['all']['kept_per_unit'])}"
        lines.append(_row([model["name"], *kept, *variance, ends]))
    return "\n".join(lines)


def _by_group(found: dict[str, Any]) -> str:
    models = routed_models(found)
    lines = [
        "The kept fraction of each group of tokens:",
        "",
        _row(["group", "", "tokens", *(model["name"] for model in models)]),
        _rule(len(models) + 3),
    ]
    for what, label in GROUPS.items():
        for name, tokens in counted(found, what):
            kept = [fixed(m["groups"][what][name]["kept_of_routed"], 3) for m in models]
            lines.append(_row([label, name, f"{tokens:,}", *kept]))
    return "\n".join(lines)


def _stability(found: dict[str, Any]) -> str:
    domains = list(found["text"])
    lines = [
        "How far two decide alike about the same tokens: over all text (equal decisions, kappa, "
        "what is left of it when each layer's tokens are shuffled, and what is over that; "
        "correlations of what layers keep and of how many units tokens get), and kappa within "
        "layers of each domain:",
        "",
        _row(["of", *AGREEMENT.values(), *domains]),
        _rule(len(AGREEMENT) + len(domains) + 1),
    ]
    for pair in found["pairs"]:
        whole = [fixed(pair["all"][name], 3) for name in AGREEMENT]
        within = [fixed(pair["domains"][name]["kappa_within_units"], 3) for name in domains]
        lines.append(_row([f"{pair['a']}, {pair['b']}", *whole, *within]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns

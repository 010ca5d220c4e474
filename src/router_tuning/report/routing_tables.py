"""Tables from the JSON of `analyse`, and what its figure and its tables read of it alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from router_tuning.report.tables import fixed, numbers

GROUPS = {
    "kind": "kind of token",
    "frequency": "how often in this text",
    "loss": "dense loss of the token",
    "next_loss": "dense loss of the next token",
}
AGREEMENT = {
    "agreement": "equal",
    "kappa": "kappa",
    "kappa_of_units": "of layers",
    "kappa_within_units": "within layers",
    "units_correlation": "r of layers",
    "tokens_correlation": "r of tokens",
}


def routed_models(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The start, where there is one, and the adapters."""
    start = [] if result["start"] is None else [result["start"]]
    return [*start, *result["adapters"]]


def counted(result: Mapping[str, Any], what: str) -> list[tuple[str, int]]:
    """The groups of a grouping that have tokens, and how many."""
    groups = result["adapters"][0]["groups"][what]
    return [(name, group["tokens"]) for name, group in groups.items() if group["tokens"]]


def mean_kept(result: Mapping[str, Any], what: str, name: str) -> float:
    """The kept fraction of a group of tokens, a mean over adapters."""
    kept = [adapter["groups"][what][name]["kept_of_routed"] for adapter in result["adapters"]]
    return float(sum(kept) / len(kept))


def routing_table(result: Mapping[str, Any]) -> Table:
    """Of each adapter what it keeps of each domain, and what its decisions' variance is made of."""
    domains = list(result["text"])
    header = ("adapter", "kept", *domains, "var. layers", "tokens (chance)", "rest")
    table = numbers(header, first="left")
    for model in routed_models(result):
        whole, parts = model["all"], model["all"]["variance"]
        table.add_row(
            model["name"],
            fixed(whole["kept_fraction"], 3),
            *(fixed(model["domains"][name]["kept_fraction"], 3) for name in domains),
            fixed(parts["units"], 2),
            f"{fixed(parts['tokens'], 3)} ({fixed(parts['tokens_by_chance'], 3)})",
            fixed(parts["rest"], 2),
        )
    return table


def token_table(result: Mapping[str, Any]) -> Table:
    """Of each group of tokens what each adapter keeps."""
    models = routed_models(result)
    table = numbers(("tokens", "number", *(model["name"] for model in models)), first="left")
    for what, label in GROUPS.items():
        table.add_section()
        for name, tokens in counted(result, what):
            kept = (model["groups"][what][name]["kept_of_routed"] for model in models)
            cells = (fixed(one, 3) for one in kept)
            table.add_row(name if what == "kind" else f"{name}, {label}", f"{tokens:,}", *cells)
    return table


def stability_table(result: Mapping[str, Any]) -> Table:
    """How alike each two decide, over all text."""
    table = numbers(("of", *AGREEMENT.values()), first="left")
    for pair in result["pairs"]:
        cells = (fixed(pair["all"][name], 3) for name in AGREEMENT)
        table.add_row(f"{pair['a']}, {pair['b']}", *cells)
    return table

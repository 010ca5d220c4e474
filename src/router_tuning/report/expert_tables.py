"""Tables of a mixture's experts, from the part "experts" of the JSON of `analyse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from router_tuning.report.tables import fixed, numbers

STABILITY = {"experts_correlation": "r of experts", "within_layers": "within layers"}


def expert_table(experts: Mapping[str, Any]) -> Table:
    """Of each layer what the dense model and each adapter give to its experts and execute there:
    the executed fraction, of all tokens and of the experts with the least and the most; the largest
    load; entropy and specialisation, of what is assigned and (behind the slash) executed.
    """
    header = ("layer", "of", "executed", "least, most", "largest load", "entropy", "specialisation")
    table = numbers(header, first="left")
    for place, dense in enumerate(experts["dense"]):
        table.add_section()
        for name, layer in (
            ("dense", dense),
            *((adapter["name"], adapter["layers"][place]) for adapter in experts["adapters"]),
        ):
            fractions = executed_fractions(layer)
            ends = (min(fractions), max(fractions)) if fractions else (None, None)
            table.add_row(
                str(layer["layer"]),
                name,
                fixed(layer["executed_fraction"], 3),
                ", ".join(fixed(end, 2) for end in ends),
                _both(layer, lambda of: max(of["load"]), 2),
                _both(layer, lambda of: of["entropy"], 3),
                _both(layer, lambda of: of["specialisation"], 3),
            )
    return table


def executed_fractions(layer: Mapping[str, Any]) -> list[float]:
    """Executed over assigned tokens, of each expert that was assigned some."""
    counts = zip(layer["executed"]["tokens"], layer["assigned"]["tokens"], strict=True)
    return [executed / assigned for executed, assigned in counts if assigned]


def _both(layer: Mapping[str, Any], value: Any, digits: int) -> str:
    found = [fixed(value(layer[what]), digits) for what in ("assigned", "executed")]
    return " / ".join(found)


def expert_stability_table(experts: Mapping[str, Any]) -> Table:
    """How alike each two adapters treat the experts: correlations of their executed fractions."""
    table = numbers(("of", *STABILITY.values()), first="left")
    for pair in experts["pairs"]:
        cells = (fixed(pair[name], 3) for name in STABILITY)
        table.add_row(f"{pair['a']}, {pair['b']}", *cells)
    return table

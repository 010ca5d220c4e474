"""What an execution of each unit weighs in a kept fraction.

With budget_in="executions" all weigh 1. With "flops" each weighs what skipping it saves of a
token's FLOPs in linear layers, over the mean of all units of the routed kinds: so a kept fraction
is what is left of all that skipping could save there. The scores of an attention grow with the
context, which a weight cannot know, and are left out.
"""

from __future__ import annotations

from torch import nn

from router_tuning.config import RoutingConfig
from router_tuning.layer_cost import LayerCost, layer_costs
from router_tuning.units import Unit, kinds_of


def unit_prices(
    decoder: nn.Module, config: RoutingConfig, units: tuple[Unit, ...]
) -> dict[str, float]:
    """The weight of an execution of each routed unit. The weights of all units of the routed kinds,
    routed or not, have the mean 1.

    Raises:
        UnsupportedModelError: with budget_in="flops", the model's FLOPs cannot be counted.
    """
    if config.budget_in == "executions":
        return {unit.name: 1.0 for unit in units}
    costs = layer_costs(decoder, dense=True)
    kinds = kinds_of(config)
    total = sum(_saved(cost, kind, config) for cost in costs for kind in kinds)
    mean = total / (len(costs) * len(kinds))
    return {unit.name: _saved(costs[unit.layer_idx], unit.kind, config) / mean for unit in units}


def _saved(cost: LayerCost, kind: str, config: RoutingConfig) -> int:
    """FLOPs of a token in linear layers that are not run if the unit is skipped."""
    # The keys of a window are made for skipped tokens too.
    makes_key = config.kv == "all" or config.kv_window > 0
    attention = cost.query + (0 if makes_key else cost.key)
    beside = cost.mlp + cost.rest - (cost.early if makes_key else 0)
    return {"attn": attention, "mlp": cost.mlp, "block": attention + beside}[kind]

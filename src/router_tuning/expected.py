"""What a budget can be expected to run, from its calibration alone: a trace for cost.py.

>>> trace = expected_trace(model, 0.7, prompt_tokens=2048, new_tokens=64)
>>> spent = cost(model, trace)
>>> spent.flops_fraction, spent.kv_bytes / spent.dense_kv_bytes, spent.weight_bytes / spent.tokens

Shapes: B rows, C columns (tokens of the whole text).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig, check_budget, threshold_for
from router_tuning.errors import BudgetError, ConfigError
from router_tuning.execution.context import routing_of
from router_tuning.record import ForwardRecord, Trace, UnitRecord
from router_tuning.units import Unit, granularity_of, is_sequence

ROWS = 16
"""Texts of a trace: where sequences are decided for, so many stand for all."""


def expected_trace(
    model: nn.Module, budget: float, prompt_tokens: int, new_tokens: int = 0, *, seed: int = 0
) -> Trace:
    """ROWS texts of a prompt and decoded tokens, in which each unit runs as often as it did on the
    text that the budget was calibrated on: tokens (sequences) drawn at random. What always runs of
    a sequence counts towards that, whatever the text's length.

    Raises:
        BudgetError: not in (0, 1], not calibrated, or calibrated without its units' kept fractions.
        ConfigError: no prompt.
    """
    if prompt_tokens < 1 or new_tokens < 0:
        raise ConfigError(
            f"a text has a prompt of at least 1 token and no less than 0 new ones; got "
            f"{prompt_tokens} and {new_tokens}"
        )
    routing = routing_of(model)
    rates = kept_per_unit(routing.config, [unit.name for unit in routing.units], budget)
    draw = torch.Generator().manual_seed(seed)
    columns = prompt_tokens + new_tokens
    keep = {
        u.name: _keep_BC(u, rates[u.name], columns, routing.config, draw) for u in routing.units
    }
    trace = Trace(routing.num_units_of_kind, tuple(keep), prices=routing.prices)
    bounds = [0, *range(prompt_tokens, columns + 1)]
    for start, end in pairwise(bounds):
        real_BT = torch.ones((ROWS, end - start), dtype=torch.bool)
        forward = ForwardRecord(start, real_BT, routing.config.kv == "kept")
        for unit in routing.units:
            keep_BT = keep[unit.name][:, start:end]
            write_BT = None if unit.kind == "mlp" else _write_BT(keep_BT, start, routing.config)
            forward.units[unit.name] = UnitRecord(keep_BT, write_BT)
        trace.forwards.append(forward)
    return trace


def kept_per_unit(config: RoutingConfig, names: list[str], budget: float) -> dict[str, float]:
    """Kept fraction of each unit at a budget, interpolated linearly between calibrated ones.

    Raises:
        BudgetError: see expected_trace.
    """
    threshold_for(config, budget)  # refuses what is out of range
    points = {1.0: dict.fromkeys(names, 1.0)}
    points |= {float(e["budget"]): e["kept_per_unit"] for e in config.calibration if _full(e)}
    budget = check_budget(budget)
    above = min((b for b in points if b >= budget), default=None)
    below = max((b for b in points if b <= budget), default=None)
    if above is None or below is None:
        raise BudgetError(
            f"nothing is known of what units run at budget {budget:g}; calibrate it again "
            "(calibrate(model, ...) or `router-tuning calibrate`)"
        )
    weight = 1.0 if above == below else (budget - below) / (above - below)
    high, low = points[above], points[below]
    return {name: weight * high[name] + (1 - weight) * low[name] for name in names}


def _full(entry: dict[str, object]) -> bool:
    return bool(entry.get("kept_per_unit"))


def _keep_BC(
    unit: Unit, rate: float, columns: int, config: RoutingConfig, draw: torch.Generator
) -> Tensor:
    """Where a unit runs: (B, C)."""
    if not is_sequence(granularity_of(config, unit)):
        return torch.rand((ROWS, columns), generator=draw) < rate
    always_C = torch.arange(columns) < (config.decide_after if config.pooling == "prefix" else 0)
    share = float(always_C.double().mean())
    # What runs in any case counts towards the rate.
    free = (rate - share) / (1 - share) if share < 1 else 1.0
    row_B = torch.randperm(ROWS, generator=draw) + 0.5 < free * ROWS
    return row_B[:, None] | always_C


def _write_BT(keep_BT: Tensor, start: int, config: RoutingConfig) -> Tensor:
    """Tokens whose keys are made."""
    if config.kv == "all" or config.kv_window:
        return torch.ones_like(keep_BT)
    return keep_BT | (torch.arange(start, start + keep_BT.shape[1]) < config.kv_sink)

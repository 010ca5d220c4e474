"""Where training starts: fresh routers, fitted to what the model's output owes to each unit.

The distillation loss of a model that keeps everything is zero and flat, so gradients alone begin
by skipping whatever the noise of the first steps picks. Its curvature is not flat, and says at
every token what is missed least (sensitivity.py). Routers start as its fit: a logit is the log of
the expected sensitivity, so that the threshold that skips the lowest logits skips what matters
least. Sensitivities of single executions do not add up; training has to find what several absences
do together (decision 0010). Routers that decide about whole units start from their order instead
(order_start.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import TrainingError
from router_tuning.execution.context import routers_of, routing_of
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.order_start import decides_whole_units, order_start
from router_tuning.training.sensitivity import Inputs, Progress, Seen, sensitivities
from router_tuning.units import decoder_of

ROWS = 128
"""Training rows that are looked at before the first step."""
LOW = 0.1
"""Quantile of the fitted logits that keeps the fresh logit: nearly everything is kept at first."""
LEAST = 1e-12
"""Lowest mean sensitivity that has a logarithm."""


def start_routers(
    model: nn.Module,
    batches: Sequence[Inputs],
    budget: float,
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> None:
    """Set fresh routers to where training begins: those that decide about whole units to the greedy
    order of these (order_start.py), others to what the model's output owes to each execution.

    Args:
        model: a routed causal LM with fresh routers.
        batches: text of the kind to train on, a row each; some ten thousand tokens are enough.
        budget: kept fraction that is trained for.
        progress: called with what is done, and what there is to do.
        seed: of the tokens that are drawn.

    Raises:
        TrainingError: no derivative is finite, or there is no text.
    """
    if decides_whole_units(model):
        order_start(model, batches, budget, progress)
    else:
        warm_start(model, batches, progress, seed=seed)


def warm_start(
    model: nn.Module,
    batches: Sequence[Inputs],
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Fit each fresh router's logit to the log of how sensitive the model is to its unit.

    All logits are shifted by the same number, so that nearly everything is kept. Routers that are
    not linear get their unit's mean.

    Args:
        model: a routed causal LM with fresh routers.
        batches: text of the kind to train on, a row each; some ten thousand tokens are enough.
        progress: called with rows done, and rows in all.
        seed: of the tokens that are drawn.

    Returns:
        Half the mean sensitivity of each unit: about the divergence in nats, over all tokens of a
        row, of the dense model from the same without the unit at one token.

    Raises:
        TrainingError: no derivative is finite.
    """
    seen = sensitivities(model, batches, progress, seed=seed)
    means = _means(seen)
    routers, prices = routers_of(model), routing_of(model).prices
    weights: dict[str, Tensor] = {}
    logs = {name: math.log(max(mean, LEAST)) for name, mean in means.items()}
    for name, of_unit in seen.items():
        weight = input_weight(routers[name])
        fitted = of_unit.fitted() if weight is not None and len(weight) == 1 else None
        if fitted is not None:
            weights[name], logs[name] = fitted
    # What is missed least for what it costs goes first.
    logs = {name: log - math.log(prices[name]) for name, log in logs.items()}
    low = _quantile(
        [
            seen[name].logits(weights[name], log) if name in weights else torch.tensor([log])
            for name, log in logs.items()
        ]
    )
    with torch.no_grad():
        for name, log in logs.items():
            weight, bias = input_weight(routers[name]), scalar_bias(routers[name])
            if bias is None:
                continue
            bias.add_(log - low)
            if weight is not None and name in weights:
                weight.copy_(weights[name][None])
    return {name: mean / 2 for name, mean in means.items()}


def _means(seen: Mapping[str, Seen]) -> dict[str, float]:
    means = {name: of_unit.mean() for name, of_unit in seen.items()}
    told = [mean for mean in means.values() if math.isfinite(mean) and mean > 0]
    if not told:
        raise TrainingError(
            "the model has no finite derivatives on the first training rows; look at these rows "
            "(are they longer than decide_after?), or train in float32 instead of half precision"
        )
    # Half precision may overflow at a unit: nothing could matter more.
    return {name: mean if math.isfinite(mean) else max(told) for name, mean in means.items()}


def _quantile(parts: Sequence[Tensor]) -> float:
    """The low quantile of all logits."""
    logits = torch.cat([part.cpu() for part in parts])
    return float(logits.kthvalue(max(round(LOW * logits.numel()), 1)).values)


def is_fresh(model: nn.Module) -> bool:
    """Whether every router still gives the logit that its config starts with, whatever it sees."""
    decoder: Any = decoder_of(model)
    device = next(decoder.parameters()).device
    probe_BTD = torch.linspace(-1, 1, decoder.config.hidden_size, device=device)[None, None]
    first = torch.full((1, 1), routing_of(model).config.init_bias, device=device)  # float32
    with torch.no_grad():
        return all(torch.equal(router(probe_BTD), first) for router in routers_of(model).values())

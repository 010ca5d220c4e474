"""Where training starts for routers that decide about whole units: in the order in which greedy
static dropping takes the units away.

What several absences of whole units do together is far from the sum of what each does, and
gradients of a model that has all units, or lacks some, do not tell it: they choose subsets that
lose more than greedy ones (docs/log.md). So the order is measured, and training begins there.
Sequence granularities decide so, and routers that see nothing (router="bias").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from router_tuning.baselines import Drops, Measure, greedy_ranking, to_drop
from router_tuning.data import evaluation_mode
from router_tuning.errors import TrainingError
from router_tuning.execution.context import dense, routers_of, routing_of
from router_tuning.record import price_of
from router_tuning.routers import scalar_bias
from router_tuning.training.objectives import distill_loss, head_of
from router_tuning.training.sensitivity import Inputs, on_device, real_tokens
from router_tuning.units import decoder_of, granularity_of, is_sequence

Progress = Callable[[int, int], None]

ROWS = 8
"""Training rows that the order is measured on: each is run some hundred times, in part."""
EVERY = 2
"""Of so many tokens one is compared with the dense model: all logits take as long as the layers."""
GAP = 0.5
"""Between the logits of neighbours in the order."""


def decides_whole_units(model: nn.Module) -> bool:
    """Whether no router tells the tokens of a sequence apart."""
    config = routing_of(model).config
    return config.router == "bias" or all(
        is_sequence(granularity_of(config, unit)) for unit in routing_of(model).units
    )


def order_start(
    model: nn.Module, batches: Sequence[Inputs], budget: float, progress: Progress | None = None
) -> list[str]:
    """Set the biases of fresh routers: logits in greedy order, a gap apart, that meet the budget.

    Args:
        model: a routed causal LM with fresh routers, which decide about whole units.
        batches: text of the kind to train on, a row each; the first 8 are used.
        budget: kept fraction down to which the order is found; what stays above it is ordered by
            its last measurement.
        progress: called with candidates tried, and candidates in all.

    Returns:
        The names of the units, those first that are missed least.

    Raises:
        TrainingError: there is no text in the rows.
    """
    rows = [ids for inputs in batches[:ROWS] for ids in _rows(model, inputs)]
    if not rows:
        raise TrainingError("the first training rows have no two tokens each; look at these rows")
    with evaluation_mode(model), torch.no_grad():
        measure = _divergence(model, rows)
        # Of few routed layers, a low budget may ask for more than there are.
        prices = routing_of(model).prices
        number = min(to_drop(model, budget), price_of(prices, prices))
        ranking = greedy_ranking(model, rows, number, measure, progress=progress)
    drops = Drops.of(model, ranking, budget)
    routers = routers_of(model)
    with torch.no_grad():
        for rank, name in enumerate(ranking):
            bias = scalar_bias(routers[name])
            if bias is not None:
                # The threshold lies between the last that goes and the first that stays.
                bias.fill_(GAP * (rank + 0.5 - drops.fewer - drops.share))
    return ranking


def _divergence(model: nn.Module, rows: Sequence[Tensor]) -> Measure:
    """How far what a model says diverges from what the dense one does, in nats over a row's tokens.
    It is less a matter of chance than the loss of the few tokens that stand in the rows.
    """
    decoder, head = decoder_of(model), head_of(model)

    def last_hidden(ids_1T: Tensor) -> Tensor:
        hidden_1TD: Tensor = decoder(input_ids=ids_1T, use_cache=False)[0]
        return hidden_1TD[0]

    with dense(model):
        teacher = [last_hidden(ids_1T) for ids_1T in rows]

    def divergence(number: int, ids_1T: Tensor) -> float:
        mean = distill_loss(last_hidden(ids_1T)[::EVERY], teacher[number][::EVERY], head)
        return float(mean) * ids_1T.shape[1]

    return divergence


def _rows(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Token ids without padding, (1, T) each, of rows that predict something."""
    ids_BT, real_BT = on_device(model, inputs)["input_ids"], real_tokens(inputs)
    rows = [ids_T[real_T.to(ids_T.device)] for ids_T, real_T in zip(ids_BT, real_BT, strict=True)]
    return [ids_T[None] for ids_T in rows if len(ids_T) > 1]

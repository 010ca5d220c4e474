"""Parameter groups: how long the steps of what are.

Inputs of one model are many times larger than those of another, and a step of the same length would
move its logits as many times as far. So the learning rate of a router's weights is divided by the
spread of its input. And Adam makes all steps equally long, however small the gradients: it would
walk at random with routers that have settled far from the threshold, until a text comes for which
the first layers are skipped. So its epsilon is set to what gradients of unsettled routers measure.
Routers that decide about whole units begin where gradients do not lead (order_start.py), and take
short steps from there. Knows nothing of losses or of the Trainer.

Shapes: B batch, T tokens, N real tokens, D hidden.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.data import evaluation_mode
from router_tuning.execution.context import ForwardContext, decided_by, routers_of
from router_tuning.lora import lora_parameters
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.budget import all_reduce_sum
from router_tuning.training.order_start import decides_whole_units
from router_tuning.training.sensitivity import Inputs, on_device
from router_tuning.units import Unit, decoder_of

SPREAD_ROWS = 2
"""Training rows that tell how far inputs spread."""
DAMPING = 0.03
"""Adam's epsilon for a router's weights, as for inputs that spread by 1: decision 0010."""
BIAS_DAMPING = 0.01
"""The same for biases."""
WHOLE_UNIT_STEP = 0.02
"""Learning rates of routers that decide about whole units, as a part of the others' (decision 15).
"""
LEAST = 0.01
"""Smallest spread that is believed, as a part of the median over units: rows of one and the same
token have none."""


def input_spread(model: nn.Module, batches: Sequence[Inputs]) -> dict[str, float]:
    """How far each routed unit's input spreads in the dense model: the root mean square deviation
    from its mean token. Empty where no token was seen. The mean over all ranks.
    """
    seen = _Spread({name: [] for name in routers_of(model)})
    with torch.no_grad(), evaluation_mode(model), decided_by(model, seen):
        for inputs in batches:
            decoder_of(model)(**on_device(model, inputs), use_cache=False)
    sums = [float(sum(found)) for found in seen.squares.values()]
    counts = [float(len(found)) for found in seen.squares.values()]
    total = all_reduce_sum([*sums, *counts], next(model.parameters()).device)
    means = [s / max(n, 1.0) for s, n in zip(total[: len(sums)], total[len(sums) :], strict=True)]
    believed = [m for m in means if math.isfinite(m) and m > 0]
    if not believed:
        return {}
    least = (LEAST * math.sqrt(statistics.median(believed))) ** 2
    return {
        name: math.sqrt(max(m, least) if math.isfinite(m) else statistics.median(believed))
        for name, m in zip(seen.squares, means, strict=True)
    }


class _Spread:
    """Keeps everything, and looks at what the units see: mean squares of each batch."""

    def __init__(self, squares: dict[str, list[float]]) -> None:
        self.squares = squares

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        x_ND = x_BTD[forward.real_BT].float()
        if len(x_ND):
            self.squares[unit.name].append(float((x_ND - x_ND.mean(0)).square().mean()))
        return torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)


def parameter_groups(
    model: nn.Module,
    args: RouterTrainingArguments,
    spreads: Mapping[str, float],
    *,
    damped: bool = True,
) -> list[dict[str, Any]]:
    """A group for each router's input weight, one for what else trains in the routers, and one for
    the biases, each with what its learning rate is `divided_by`; and one for the adapter's LoRA.

    Args:
        model: with routers.
        args: learning rates and weight decay.
        spreads: of the routers' inputs, by unit; 1 where there is none.
        damped: whether the optimizer has an epsilon, as Adam has.
    """

    def damping(size: float) -> dict[str, float]:
        return {"eps": size} if damped else {}

    decay = args.weight_decay
    # Without a start there is no order yet that long steps could lose.
    step = WHOLE_UNIT_STEP if args.warm_start and decides_whole_units(model) else 1.0

    def slowed(some: list[nn.Parameter], rate: float, by: float, decay: float) -> dict[str, Any]:
        by /= step
        return {"params": some, "lr": rate / by, "weight_decay": decay, "divided_by": by}

    groups: list[dict[str, Any]] = []
    others: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, router in routers_of(model).items():
        weight, bias = input_weight(router), scalar_bias(router)
        if weight is not None:
            spread = spreads.get(name, 1.0)
            group = slowed([weight], args.learning_rate, spread, decay)
            groups.append(group | damping(DAMPING * spread))
        rest = [p for p in router.parameters() if p.requires_grad]
        others += [p for p in rest if p is not weight and p is not bias]
        biases += [] if bias is None else [bias]
    shared = [
        slowed(others, args.learning_rate, 1.0, decay),
        slowed(biases, args.bias_learning_rate, 1.0, 0.0) | damping(BIAS_DAMPING),
        # With Adam's own epsilon: that of the others is the size of routers' gradients.
        {"params": lora_parameters(model), "lr": args.lora_learning_rate, "weight_decay": 0.0},
    ]
    return groups + [group for group in shared if group["params"]]

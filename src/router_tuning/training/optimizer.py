"""Parameter groups: how long the steps of what are. Knows nothing of losses or of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from router_tuning.execution.context import routers_of
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.arguments import RouterTrainingArguments


def parameter_groups(
    model: nn.Module, args: RouterTrainingArguments, spreads: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A group for each router's input weight, whose learning rate is for inputs of spread 1; one
    for what else is in the routers; and one for the biases.
    """
    decay = args.weight_decay
    groups: list[dict[str, Any]] = []
    others: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, router in routers_of(model).items():
        weight, bias = input_weight(router), scalar_bias(router)
        if weight is not None:
            rate = args.learning_rate / (spreads.get(name) or 1.0)
            groups.append({"params": [weight], "lr": rate, "weight_decay": decay})
        others += [p for p in router.parameters() if p.requires_grad and p is not weight]
        biases.append(bias)
    others = [p for p in others if all(p is not bias for bias in biases)]
    if others:
        groups.append({"params": others, "lr": args.learning_rate, "weight_decay": decay})
    return [*groups, {"params": biases, "lr": args.bias_learning_rate, "weight_decay": 0.0}]

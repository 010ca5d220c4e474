"""Where training starts: fresh routers whose logits say how much the model needs each unit.

The distillation loss of a model that keeps everything is zero and flat, so gradients alone begin by
skipping whatever the noise of the first steps picks, the indispensable first layers included. A
forward without each unit alone tells them apart beforehand. Fresh routers stay neutral: logits are
only raised.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.baselines import StaticDrop
from router_tuning.data import evaluation_mode
from router_tuning.execution.context import (
    ForwardContext,
    decided_by,
    dense,
    routers_of,
    routing_of,
)
from router_tuning.execution.partial import entering_states, run_from
from router_tuning.routers import scalar_bias
from router_tuning.training.objectives import distill_loss, head_of
from router_tuning.units import Unit, decoder_of

Progress = Callable[[int, int], None]

LOW = 0.1
"""Quantile of the harms that keeps the fresh logit: a tenth of the units, to be skipped first."""


def warm_start(
    model: nn.Module, inputs: Mapping[str, Tensor], progress: Progress | None = None
) -> dict[str, float]:
    """Raise each fresh router's logit by log(harm / the tenth part's harm), where that is above 0.

    Args:
        model: a routed causal LM with fresh routers.
        inputs: a batch: "input_ids" (B, T), and "attention_mask" where rows are padded.
        progress: called with units done, and units in all.

    Returns:
        The harm of each unit's absence: KL(dense || without it) in nats a token.
    """
    harm = harm_without(model, inputs, progress)
    logs = torch.tensor(list(harm.values()), dtype=torch.float64).clamp(min=1e-6).log()
    rises = (logs - logs.quantile(LOW)).clamp(min=0).tolist()
    with torch.no_grad():
        for router, rise in zip(routers_of(model).values(), rises, strict=True):
            scalar_bias(router).add_(rise)
    return harm


@torch.no_grad()
def input_spread(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square deviation of each routed unit's input from its mean token, dense model.

    Inputs of one model are many times larger than those of another, and a step of the same
    size would move its logits as many times as far.
    """
    seen = _Spread()
    with evaluation_mode(model), decided_by(model, seen):
        ids_BT, mask_BT = _on_device(model, inputs)
        decoder_of(model)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    return seen.found


class _Spread:
    """Keeps everything, and looks at what the units see."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        x_ND = x_BTD[forward.real_BT].float()
        self.found[unit.name] = float((x_ND - x_ND.mean(0)).square().mean().sqrt())
        return torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)


def _on_device(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device
    mask_BT = inputs.get("attention_mask")
    return inputs["input_ids"].to(device), None if mask_BT is None else mask_BT.to(device)


@torch.no_grad()
def harm_without(
    model: nn.Module, inputs: Mapping[str, Tensor], progress: Progress | None = None
) -> dict[str, float]:
    """KL(dense || dense but for one unit), nats a token, for each routed unit.

    Only the layers from a unit's own on are run again.
    """
    decoder, head = decoder_of(model), head_of(model)
    ids_BT, mask_BT = _on_device(model, inputs)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()

    def hidden() -> Tensor:
        output: Any = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        chosen_ND: Tensor = output[0][real_BT]
        return chosen_ND

    harm: dict[str, float] = {}
    units = routing_of(model).units
    with evaluation_mode(model):
        with dense(model):
            teacher_ND = hidden()
            states = entering_states(decoder, ids_BT, mask_BT)
        for unit in units:
            first = unit.layer_idx
            with (
                decided_by(model, StaticDrop([unit.name])),
                run_from(decoder, first, states[first]),
            ):
                harm[unit.name] = float(distill_loss(hidden(), teacher_ND, head))
            if progress is not None:
                progress(len(harm), len(units))
    return harm


def is_fresh(model: nn.Module) -> bool:
    """Whether every router still gives the logit that its config starts with, whatever it sees."""
    decoder: Any = decoder_of(model)
    device = next(decoder.parameters()).device
    probe_BTD = torch.linspace(-1, 1, decoder.config.hidden_size, device=device)[None, None]
    first = routing_of(model).config.init_bias
    with torch.no_grad():
        return all(float(router(probe_BTD)) == first for router in routers_of(model).values())

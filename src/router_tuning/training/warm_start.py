"""Where training starts: fresh routers whose logits say how much the model needs each unit, and its
first token.

The distillation loss of a model that keeps everything is zero and flat, so gradients alone begin by
skipping whatever the noise of the first steps picks, the indispensable first layers included. A
forward without each unit alone tells them apart beforehand. Nor do gradients say that a skipped
token's key is missed by later tokens (kv="kept"), and none is missed like that of a text's first
token, on which attention rests where it has nothing to say (Xiao et al. 2024, "attention sinks").
Logits are raised, so that routers keep all, or nearly all, to begin with.

Shapes: B batch, T tokens, D hidden, N real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.baselines import StaticDrop
from router_tuning.data import evaluation_mode
from router_tuning.errors import TrainingError
from router_tuning.execution.context import (
    ForwardContext,
    decided_by,
    dense,
    routers_of,
    routing_of,
)
from router_tuning.execution.partial import entering_states, run_from
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.objectives import distill_loss, head_of
from router_tuning.units import Unit, decoder_of

Progress = Callable[[int, int], None]
Inputs = Mapping[str, Tensor]
"""What a forward gets, without labels: "input_ids" (B, T), and "attention_mask" where padded."""

ROWS = 2
"""Training rows that are looked at before the first step: a few hundred tokens tell units apart."""
LOW = 0.1
"""Quantile of the harms that keeps the fresh logit: a tenth of the units, to be skipped first."""
FIRST = 4.0
"""Logits by which a text's first token is kept the more where its key would be lost."""
SCATTER = 0.5
"""Standard deviation of other tokens' logits that this may cost, so that nearly all are kept."""


def warm_start(
    model: nn.Module, batches: Sequence[Inputs], progress: Progress | None = None
) -> dict[str, float]:
    """Raise each fresh router's logit by log(harm / the tenth part's harm), where that is above 0.

    Args:
        model: a routed causal LM with fresh routers.
        batches: text of the kind to train on; a few hundred tokens are enough.
        progress: called with forwards done, and forwards in all.

    Returns:
        The harm of each unit's absence: KL(dense || without it) in nats a token.

    Raises:
        TrainingError: no harm is finite.
    """
    harm = harm_without(model, batches, progress)
    finite = [h for h in harm.values() if math.isfinite(h)]
    if not finite:
        raise TrainingError(
            "without any one of its units the model gives no finite logits on the first training "
            "rows; look at these rows, or train in float32 instead of half precision"
        )
    # Half precision may overflow without a unit: nothing could be worse.
    told = [h if math.isfinite(h) else max(finite) for h in harm.values()]
    logs = torch.tensor(told, dtype=torch.float64).clamp(min=1e-6).log()
    rises = (logs - logs.quantile(LOW)).clamp(min=0).tolist()
    with torch.no_grad():
        for router, rise in zip(routers_of(model).values(), rises, strict=True):
            bias = scalar_bias(router)
            if bias is not None:
                bias.add_(rise)
    config = routing_of(model).config
    if config.kv == "kept" and not config.kv_sink:
        favour_first(model, batches)
    return harm


@torch.no_grad()
def harm_without(
    model: nn.Module, batches: Sequence[Inputs], progress: Progress | None = None
) -> dict[str, float]:
    """KL(dense || dense but for one unit), nats a token, for each routed unit.

    Only the layers from a unit's own on are run again.
    """
    decoder, head = decoder_of(model), head_of(model)
    names = [unit.name for unit in routing_of(model).units]
    sums, tokens = dict.fromkeys(names, 0.0), 0
    for number, inputs in enumerate(batches):
        given = on_device(model, inputs)
        real_BT = real_tokens(given)
        tokens += int(real_BT.sum())
        with evaluation_mode(model):
            with dense(model), entering_states(decoder) as states:
                teacher_ND = _hidden(decoder, given, real_BT)
            for done, unit in enumerate(routing_of(model).units, start=1):
                first = unit.layer_idx
                with (
                    decided_by(model, StaticDrop([unit.name])),
                    run_from(decoder, first, states[first]),
                ):
                    student_ND = _hidden(decoder, given, real_BT)
                kl = float(distill_loss(student_ND, teacher_ND, head))
                sums[unit.name] += kl * len(teacher_ND)
                if progress is not None:
                    progress(number * len(names) + done, len(batches) * len(names))
    return {name: total / max(tokens, 1) for name, total in sums.items()}


def favour_first(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Raise the logits of what looks like a text's first token by FIRST, and those of the average
    other token by nothing: by less where that would scatter the others by more than SCATTER.
    Routers that are not linear, and of MLPs, stay as they are.
    """
    seen = _Inputs({unit.name: [] for unit in routing_of(model).units if unit.kind != "mlp"})
    with torch.no_grad(), evaluation_mode(model), decided_by(model, seen):
        for inputs in batches:
            decoder_of(model)(**on_device(model, inputs), use_cache=False)
    with torch.no_grad():
        for name, router in routers_of(model).items():
            weight, bias = input_weight(router), scalar_bias(router)
            if not seen.found.get(name) or weight is None or bias is None or len(weight) > 1:
                continue
            first_ND, others_ND = (
                torch.cat(parts) for parts in zip(*seen.found[name], strict=True)
            )
            if not len(others_ND):
                continue
            away_D = first_ND.mean(0) - others_ND.mean(0)
            toward_D = away_D / away_D.square().sum().clamp(min=1e-6)
            scatter = float((others_ND @ toward_D).std(correction=0))
            toward_D *= min(FIRST, SCATTER / max(scatter, 1e-6))
            weight.copy_(toward_D[None])
            bias.sub_(toward_D @ others_ND.mean(0))


class _Inputs:
    """Keeps everything, and notes what units see of first tokens, and of others: (N, D) each."""

    def __init__(self, found: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        self.found = found

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        first_BT = forward.real_BT & (forward.position_BT == 0)
        if unit.name in self.found:
            x_BTD = x_BTD.float()
            others_BT = forward.real_BT & ~first_BT
            self.found[unit.name].append((x_BTD[first_BT], x_BTD[others_BT]))
        return torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)


def _hidden(decoder: Any, given: Inputs, real_BT: Tensor) -> Tensor:
    """Last hidden states of the real tokens (N, D)."""
    chosen_ND: Tensor = decoder(**given, use_cache=False)[0][real_BT]
    return chosen_ND


def on_device(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs where the model is, without labels."""
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in inputs.items() if name != "labels"}


def real_tokens(inputs: Inputs) -> Tensor:
    """False at padding: (B, T)."""
    mask_BT = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask_BT is None else mask_BT.bool()


def is_fresh(model: nn.Module) -> bool:
    """Whether every router still gives the logit that its config starts with, whatever it sees."""
    decoder: Any = decoder_of(model)
    device = next(decoder.parameters()).device
    probe_BTD = torch.linspace(-1, 1, decoder.config.hidden_size, device=device)[None, None]
    first = torch.full((1, 1), routing_of(model).config.init_bias, device=device)  # float32
    with torch.no_grad():
        return all(torch.equal(router(probe_BTD), first) for router in routers_of(model).values())

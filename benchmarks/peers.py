"""How others train routers, on our engine: mixture of depths, and the paper's official recipe.

Mixture of depths (Raposo et al. 2024, arXiv 2404.02258) trains all weights with the routers, on the
text's own cross entropy. In `TopKTrainer` each unit runs for an equal share of every sequence's
tokens, those with the largest logits, and the router gets its gradient since it weighs what the
unit gives. Which these are depends on later tokens, so thresholds stand in for it where text is
written. `ThresholdTrainer` decides as our routers do from the start, and differs from them in what
trains and on what.

The official recipe (He et al. 2025, arXiv 2410.13184) trains routers alone. `OFFICIAL` is what the
code that came with the paper has in its script, which switches the penalty on what is kept off; the
paper's loss has one.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from router_tuning import decided_by, record
from router_tuning.execution.context import ForwardContext, check_names, routers_of, routing_of
from router_tuning.record import ForwardRecord
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.budget import target_at
from router_tuning.training.trainer import RouterTrainerMixin, RouterTrainingArguments
from router_tuning.units import Unit, decoder_layers, decoder_of, first_of, part_of, post_norm_of

INIT_STD = 0.02
"""Of the weights of routers that rank tokens: equal ones would rank none."""

OFFICIAL_LAYERS = 16
OFFICIAL_BATCH = 64
OFFICIAL: dict[str, Any] = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all steps
    "weight_decay": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": OFFICIAL_BATCH,
}
"""scripts/finetune_router_tuning.sh of CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths (6f7ad04)."""


# ---- who decides ----


class TopK:
    """Keeps the same share of each sequence's tokens in every unit: those with the largest logits.
    Not causal. Sequences have no padding.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        logits_BT = forward.router(unit)(x_BTD)
        first_Bk = logits_BT.topk(round(self.share * logits_BT.shape[1]), dim=1).indices
        return torch.zeros_like(logits_BT, dtype=torch.bool).scatter(1, first_Bk, True)


class Thresholds:
    """Keeps tokens whose logit is at least their unit's threshold."""

    def __init__(self, at: Mapping[str, float]) -> None:
        self.at = at

    def check(self, units: tuple[Unit, ...]) -> None:
        """Refuse units without a threshold."""
        check_names("thresholds", self.at, units, all_of=True)

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        keep_BT: Tensor = forward.router(unit)(x_BTD) >= self.at[unit.name]
        return keep_BT


# ---- where routers begin ----


def without_bias(model: nn.Module) -> None:
    """Make the routers linear maps alone, as those of both papers are. Fresh ones give 0, which a
    threshold of 0 (0.5 of the sigmoid) keeps.
    """
    for router in routers_of(model).values():
        bias = scalar_bias(router)
        assert bias is not None, "linear routers have one"
        nn.init.zeros_(bias.requires_grad_(False))


def weigh_by_routers(model: nn.Module) -> None:
    """From now on, what a routed unit gives is weighed with twice the sigmoid of its logits, so
    that routers around 0 leave a pretrained model as it is. For fresh routers, which are drawn.
    """
    without_bias(model)
    decoder = decoder_of(model)
    routers = routers_of(model)
    for unit in routing_of(model).units:
        drawn = input_weight(routers[unit.name])
        assert drawn is not None
        nn.init.normal_(drawn, std=INIT_STD)
        layer = decoder_layers(decoder)[unit.layer_idx]
        weight = _Weight(unit)
        routers[unit.name].register_forward_hook(weight.note)
        branch = post_norm_of(decoder, layer, unit.kind) or part_of(decoder, layer, unit.kind)
        branch.register_forward_hook(weight.weigh)


class _Weight:
    """Brings the logits of a unit's router to what the unit gives in the same forward."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.logits_BT: Tensor | None = None

    def note(self, router: nn.Module, args: tuple[Any, ...], logits_BT: Tensor) -> None:
        self.logits_BT = logits_BT

    def weigh(self, branch: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.logits_BT is None:  # a forward in which nobody asks routers
            return output
        state_BTD = first_of(output)
        weight_BT1 = 2 * self.logits_BT.sigmoid()[..., None].to(state_BTD.dtype)
        self.logits_BT = None
        if self.unit.kind == "block":  # which gives the stream, not what it adds to it
            weighed_BTD = weight_BT1 * state_BTD + (1 - weight_BT1) * args[0]
        else:
            weighed_BTD = weight_BT1 * state_BTD
        return (weighed_BTD, *output[1:]) if isinstance(output, tuple) else weighed_BTD


# ---- mixture of depths ----


@dataclass
class AllWeightsArguments(RouterTrainingArguments):
    """Arguments of a training of all weights."""

    weights_learning_rate: float = field(
        default=2e-5, metadata={"help": "Learning rate of all weights but the routers'."}
    )


class ThresholdTrainer(RouterTrainerMixin, Trainer):
    """Trains all weights, with routers, budget and start of a training of ours. Takes a frozen base
    with routers, and `objective="lm"`: there is no dense model left to stay close to.
    """

    args: AllWeightsArguments
    arguments = AllWeightsArguments

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of the routers, and the other weights, which train from here on: the start of the
        routers wants a frozen model.
        """
        optimizer = super().create_optimizer(model)
        routers = {p for router in routers_of(self.routed).values() for p in router.parameters()}
        weights = [p.requires_grad_() for p in self.routed.parameters() if p not in routers]
        rate = self.args.weights_learning_rate
        optimizer.add_param_group({"params": weights, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The routers' default, constant and then linearly to 0, by the steps that are foreseen
        now: a clock may change its mind.
        """

        def factor(step: int) -> float:
            left = 1 - step / max(self.state.max_steps, step, 1)
            return min(left / max(self.args.cooldown_fraction, 1e-9), 1.0)

        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler


class TopKTrainer(ThresholdTrainer):
    """Trains all weights while units run for the tokens with the largest logits: the share falls
    from all to the budget as the target of our budget does. For `weigh_by_routers` models.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With Adam's own epsilon: ours is the size of straight-through gradients."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["eps"] = self.args.adam_epsilon
        return optimizer

    def task_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """Cross entropy while the largest logits decide."""
        state, anneal = self.state, self.args.anneal_fraction
        share = target_at(state.global_step, state.max_steps, self.budget, anneal)
        with decided_by(self.routed, TopK(share)):
            return super().task_loss(model, inputs, num_items_in_batch, return_outputs)


class Clock(TrainerCallback):
    """Ends a training when its time is used up, to half a step, and foresees how many steps that
    will be: schedules go by `state.max_steps`. Time counts from when the clock is made.
    """

    def __init__(self, seconds: float) -> None:
        self.end = perf_counter() + seconds
        self.first_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = perf_counter()
        left = (self.end - now) / (now - self.first_step) * state.global_step
        if left < 0.5:
            control.should_training_stop = True
        # Never the next step: the Trainer would end there by itself, on a guess.
        state.max_steps = state.global_step + max(round(left), 2)


# ---- the official recipe ----


def official_layers(num_layers: int) -> list[int]:
    """The deepest layers that the official code routes: all but the last."""
    return list(range(max(num_layers - 1 - OFFICIAL_LAYERS, 0), num_layers - 1))


class OfficialTrainer(Trainer):
    """Trains what is not frozen on the labels' cross entropy, and on a hinge where it has a weight.

    Paper eq. 9 and 10: L_task + lambda * ReLU(||M||_0 - s), s = 0.5, lambda of 0.1, 0.01, 0.001 or
    0. The code sums it over layers, each with its own share of the micro-batch's tokens; its script
    has lambda = 0.
    """

    def __init__(
        self, *args: Any, hinge_weight: float = 0.0, capacity: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.hinge_weight, self.capacity = hinge_weight, capacity
        # As in the transformers of its day: the mean of micro-batches' means.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy and hinge."""
        assert self.model is not None
        with record(self.model) as trace:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.hinge_weight:
            loss = loss + self.hinge_weight * hinge(trace.forwards[-1], self.capacity)
        return (loss, outputs) if return_outputs else loss


def hinge(forward: ForwardRecord, capacity: float) -> Tensor:
    """By how much each unit's kept fraction exceeds the capacity, summed over units. No gradient
    reaches a unit that keeps less.
    """
    soft = [unit.soft_BT for unit in forward.units.values()]
    gates = [soft_BT[forward.real_BT] for soft_BT in soft if soft_BT is not None]
    return torch.stack([torch.relu(gate_N.mean() - capacity) for gate_N in gates]).sum()

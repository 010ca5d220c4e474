"""What `RouterTrainer` can be told, beyond `transformers.TrainingArguments`.

It belongs to one training: an adapter does not save it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from router_tuning.config import check_budget
from router_tuning.errors import ConfigError
from router_tuning.training.warm_start import ROWS

OBJECTIVES = ("distill", "lm")


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """Arguments of a router training; defaults that differ from transformers' are here too."""

    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    """What `objective` can be."""

    objective: str = field(
        default="distill",
        metadata={
            "help": '"distill": stay close to the base model, without routers and without the '
            'adapter\'s LoRA (needs no labels); "lm": predict the labels of the data.'
        },
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Kept fraction to train for, in (0, 1]. None takes the budget of the adapter's "
            "config."
        },
    )
    budget_weight: float = field(
        default=20.0,
        metadata={"help": "Weight of (kept - target)^2 beside the task's loss (>= 0)."},
    )
    budget_momentum: float = field(
        default=0.0,
        metadata={
            "help": "How much of the mean kept fraction survives an optimizer step, in [0, 1). "
            "0 takes the mean over one step's micro-batches and ranks; more is smoother but late: "
            "the kept fraction then swings around its target."
        },
    )
    anneal_fraction: float = field(
        default=0.3,
        metadata={
            "help": "The target goes from 1 to the budget over this part of the steps, in [0, 1]."
        },
    )
    warm_start: int = field(
        default=ROWS,
        metadata={
            "help": "Fresh routers begin as a fit to how sensitive the model is to each unit, "
            "token by token, on so many training rows at most; those that decide about whole units "
            "begin in the order in which these are missed, and take short steps. 0 begins with all "
            "alike."
        },
    )
    threshold_range: float = field(
        default=2.0,
        metadata={
            "help": "Every second text of a batch decides at a threshold lowered by up to so many "
            "logits, so that the adapter learns larger budgets too; these texts do not count "
            "towards its own. 0 trains that one only, as do batches of one text."
        },
    )
    lm_weight: float = field(
        default=0.1,
        metadata={
            "help": 'With objective "distill": add the cross entropy to the text itself, so many '
            "times. More of it learns the text of training, its template included; 0 stays as "
            "close to the dense model as can be."
        },
    )
    distill_positions: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of the real positions whose KL is computed in training, in (0, 1]. "
            "Fewer is faster."
        },
    )
    learning_rate: float = field(
        default=5e-3,
        metadata={
            "help": "Learning rate of the routers' weights, for inputs that spread by 1: each "
            "router's is divided by the spread of its input."
        },
    )
    bias_learning_rate: float = field(
        default=0.1,
        metadata={
            "help": "Learning rate of the routers' scalar biases, which set how much is kept."
        },
    )
    lora_learning_rate: float = field(
        default=2e-4,
        metadata={"help": "Learning rate of the adapter's LoRA, where it has one."},
    )
    adam_beta2: float = field(  # 0.999 remembers the squares of a bad phase for a whole training
        default=0.98, metadata={"help": "Adam's beta2: how long it remembers squared gradients."}
    )
    cooldown_fraction: float = field(
        default=0.5,
        metadata={
            "help": "With lr_scheduler_type warmup_stable_decay: the learning rate goes to 0 over "
            "this last fraction of the steps, in [0, 1]."
        },
    )
    lr_scheduler_type: str = field(  # constant while the target moves, then down
        default="warmup_stable_decay", metadata={"help": "Any scheduler of transformers."}
    )
    max_grad_norm: float = field(  # what is large depends on the size of the routers' inputs
        default=0.0, metadata={"help": "Largest norm of the gradient; 0 does not clip."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    save_steps: float = field(  # a checkpoint is a few hundred kB
        default=50, metadata={"help": "Save every so many steps."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Number of checkpoints to keep."}
    )
    remove_unused_columns: bool = field(  # a PeftModel's forward names no columns to go by
        default=False, metadata={"help": "Drop the columns that the model's forward does not name."}
    )
    prediction_loss_only: bool = field(  # evaluation never makes all logits
        default=True, metadata={"help": "Evaluate the loss only."}
    )
    ddp_find_unused_parameters: bool | None = (
        field(  # every router takes part in every training step
            default=False, metadata={"help": "Let DDP look for parameters without a gradient."}
        )
    )

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "warmup_stable_decay" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"decay_type": "linear"}
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._check()

    def _check(self) -> None:
        if self.objective not in self.objectives:
            raise ConfigError(
                f"objective must be one of {', '.join(self.objectives)}, got {self.objective!r}"
            )
        if self.budget is not None:
            self.budget = check_budget(self.budget)
        for name, ok, wanted in (
            ("budget_weight", self.budget_weight >= 0, "at least 0"),
            ("budget_momentum", 0 <= self.budget_momentum < 1, "in [0, 1)"),
            ("anneal_fraction", 0 <= self.anneal_fraction <= 1, "in [0, 1]"),
            ("warm_start", self.warm_start >= 0, "at least 0"),
            ("threshold_range", 0 <= self.threshold_range < math.inf, "at least 0 and finite"),
            ("lm_weight", 0 <= self.lm_weight < math.inf, "at least 0 and finite"),
            ("distill_positions", 0 < self.distill_positions <= 1, "in (0, 1]"),
            ("bias_learning_rate", self.bias_learning_rate > 0, "above 0"),
            ("lora_learning_rate", 0 < self.lora_learning_rate < math.inf, "above 0 and finite"),
            ("cooldown_fraction", 0 <= self.cooldown_fraction <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if checkpointing.get("use_reentrant"):
            raise ConfigError(REENTRANT)

    def scheduler_kwargs(self, steps: int) -> dict[str, Any]:
        """The scheduler's own arguments for a training of so many steps."""
        kwargs: dict[str, Any] = dict(self.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        if self.lr_scheduler_type == "warmup_stable_decay":
            kwargs.setdefault("num_decay_steps", round(self.cooldown_fraction * steps))
        return kwargs


REENTRANT = (
    "reentrant activation checkpointing throws away the graph that the budget's gradient needs, so "
    "the routers would not learn it; use "
    'activation_checkpointing_kwargs={"use_reentrant": False}, which is the default'
)

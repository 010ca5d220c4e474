"""Routers in TRL: supervised fine-tuning and direct preference optimisation, with the budget term.

TRL is the extra `trl`; importing this file imports it, so the package does that only when one of
these names is asked for. TRL patches the model with a fused head and computes its own loss there.
`RouterSFTTrainer` does not use it for our objectives: these work from last hidden states, a chunk
of positions at a time, and entropy and accuracy are read off the same chunks.

Shapes: B batch, T tokens, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from router_tuning.errors import ConfigError
from router_tuning.execution.context import dense, routing_of
from router_tuning.execution.prompts import NO_LABEL, pools_prompts
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.budget import all_reduce_sum
from router_tuning.training.objectives import Predictions
from router_tuning.training.trainer import RouterTrainerMixin

try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ConfigError(
        f"training routers with TRL needs trl, which cannot be imported ({error}); run pip install "
        '"router-tuning[trl]"'
    ) from error

__all__ = ["RouterDPOConfig", "RouterDPOTrainer", "RouterSFTConfig", "RouterSFTTrainer"]


@dataclass
class RouterSFTConfig(RouterTrainingArguments, SFTConfig):
    """Arguments of `RouterSFTTrainer`: those of `RouterTrainingArguments`, with their defaults, and
    of `trl.SFTConfig`.
    """

    router_aux_loss_coef: float | None = field(  # experts are frozen, and so is who picks them
        default=0.0, metadata={"help": "Weight of the load-balancing loss of a mixture of experts."}
    )


class RouterSFTTrainer(RouterTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains routers: of a PEFT model, or of a model and a `peft_config`.

    >>> config = RouterTuningConfig(granularity="attn_token", budget=0.8)
    >>> args = RouterSFTConfig("out", max_steps=120, packing=True, max_length=512)
    >>> RouterSFTTrainer(model, args, train_dataset=dataset, peft_config=config).train()
    """

    args: RouterSFTConfig
    arguments = RouterSFTConfig

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self._check_packing()
        if self.aux_loss_enabled and not self._leaves_the_loss_to_trl():
            raise ConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} weighs a load-balancing loss, "
                f'which the objective "{self.args.objective}" has not: experts are frozen, and so '
                "is who picks them; leave it at 0.0"
            )
        if self.args.objective == "distill" and self.args.loss_type != "nll":
            raise ConfigError(
                f'loss_type="{self.args.loss_type}" is a loss on labels, and objective "distill" '
                'has its own; use objective="lm", or loss_type="nll"'
            )

    def _check_packing(self) -> None:
        args = self.args
        if args.eval_packing and not self.padding_free and args.packing_strategy != "wrapped":
            raise ConfigError(
                "eval_packing=True without packing=True lets packed texts see each other, since "
                "TRL then hands no positions on; pack both, or neither"
            )
        if not self.padding_free:
            return
        if args.pad_to_multiple_of:
            raise ConfigError(
                f"pad_to_multiple_of={args.pad_to_multiple_of} adds padding that rows of packed "
                "texts do not mark, so it would count towards the budget; leave it out"
            )
        if pools_prompts(routing_of(self.routed).config):
            raise ConfigError(
                'pooling="prompt" takes one text a row; use packing=False and padding_free=False, '
                'or train with pooling="prefix"'
            )

    def task_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """As `RouterTrainer`'s, from chunks of logits. Losses that are TRL's own are left to it."""
        if self._leaves_the_loss_to_trl():
            return super().task_loss(model, inputs, num_items_in_batch, return_outputs)
        self._predictions = Predictions()
        if self.args.objective == "distill":
            loss_and_outputs = self._distill(model, inputs)
        else:
            loss_and_outputs = self._lm(model, inputs, num_items_in_batch)
        self._note(self._predictions)
        return loss_and_outputs

    def _leaves_the_loss_to_trl(self) -> bool:
        return self.args.objective == "lm" and (
            self.args.loss_type != "nll"
            or self.label_smoother is not None
            or callable(self.compute_loss_func)
        )

    def _note(self, predictions: Predictions) -> None:
        """Put the metrics where TRL's own log looks for them."""
        sums = (predictions.entropy, predictions.correct, predictions.number)
        entropy, correct, number = all_reduce_sum([float(x) for x in sums], self.args.device)
        metrics = self._metrics["train" if self.routed.training else "eval"]
        metrics["entropy"].append(entropy / max(number, 1.0))
        metrics["mean_token_accuracy"].append(correct / max(number, 1.0))

    def _first_rows(self, number: int) -> list[dict[str, Tensor]]:
        """The mixin's; of packed rows the texts, each alone."""
        if not self.padding_free:
            return super()._first_rows(number)
        rows: Any = self.train_dataset
        texts = (ids_T for row in rows for ids_T in _texts(row))
        return [{"input_ids": ids_T[None]} for ids_T in itertools.islice(texts, number)]


def _texts(row: Mapping[str, Any]) -> Iterator[Tensor]:
    """The token ids of each text in a row of TRL's."""
    ids_T = torch.as_tensor(row["input_ids"])
    yield from ids_T.split(list(row.get("seq_lengths") or [len(ids_T)]))


@dataclass
class RouterDPOConfig(RouterTrainingArguments, DPOConfig):
    """Arguments of `RouterDPOTrainer`: those of `RouterTrainingArguments`, with their defaults, and
    of `trl.DPOConfig`.
    """

    objectives: ClassVar[tuple[str, ...]] = ("dpo",)

    objective: str = field(
        default="dpo", metadata={"help": '"dpo": the loss of DPOTrainer, as loss_type says.'}
    )
    router_aux_loss_coef: float | None = field(  # as in RouterSFTConfig
        default=0.0, metadata={"help": "Weight of the load-balancing loss of a mixture of experts."}
    )


class RouterDPOTrainer(RouterTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` that trains routers; its reference is the model with the adapter off.

    The answers of a pair decide at one threshold, and both count towards the budget.
    """

    args: RouterDPOConfig
    arguments = RouterDPOConfig

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        routed: Any = self.routed
        if self.ref_model is None and "ref" in routed.peft_config:
            # TRL's frozen copy of an adapter that was there before, which skips as that does.
            routed.delete_adapter("ref")

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """TRL's, with the adapter off whatever the adapter is: it may be asked before its copy of
        the adapter is gone.
        """
        with dense(self.routed):
            return super().compute_ref_log_probs(model, inputs)

    def labels_of(self, inputs: dict[str, Any]) -> Tensor | None:
        """The answers' tokens."""
        labels_BT: Tensor = inputs["input_ids"].masked_fill(
            inputs["completion_mask"] == 0, NO_LABEL
        )
        return labels_BT

    def texts_of(self, inputs: dict[str, Any]) -> Tensor:
        """The number of each row's pair; the rows are the chosen answers, then the rejected."""
        return torch.arange(len(inputs["input_ids"]) // 2).repeat(2)

    def _first_rows(self, number: int) -> list[dict[str, Tensor]]:
        """The texts of the first pairs, each alone."""
        found = []
        for pair in super()._first_rows(math.ceil(number / 2)):
            labels_BT = self.labels_of(pair)
            assert labels_BT is not None
            for ids_T, labels_T, mask_T in zip(
                pair["input_ids"], labels_BT, pair["attention_mask"], strict=True
            ):
                real_T = mask_T.bool()
                found.append({"input_ids": ids_T[real_T][None], "labels": labels_T[real_T][None]})
        return found[:number]

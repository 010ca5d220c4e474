"""A `transformers.Trainer` that trains routers: loss = task + weight * (kept - target)^2.

`RouterTrainerMixin` adds the budget to any Trainer's `compute_loss`; `RouterTrainer` is the mixin
over the plain Trainer. LoRA that the routers' adapter has (lora.py) trains with them. The base
model stays frozen, so a checkpoint holds the adapter, the optimizer and the budget's running mean,
and a resumed run gives the losses of an uninterrupted one. Ctrl-C, and a loss or gradient that is
not finite, leave a checkpoint of the last good step behind.

Shapes: B batch, T tokens, N chosen positions, D hidden.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from router_tuning.config import check_budget
from router_tuning.errors import TrainingError
from router_tuning.execution.context import (
    dense,
    lowered_thresholds,
    packed_texts,
    prompts_until,
    record,
    routing_of,
)
from router_tuning.execution.prompts import label_starts
from router_tuning.record import ForwardRecord
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.budget import (
    Kept,
    RunningKept,
    all_reduce_sum,
    budget_term,
    count_kept,
    target_at,
)
from router_tuning.training.checks import (
    check_arguments,
    check_checkpointing,
    check_head,
    check_model,
    plain_if_dequantised,
)
from router_tuning.training.objectives import (
    Head,
    Predictions,
    distill_loss,
    head_of,
    lm_loss,
    next_tokens,
    shifted_targets,
)
from router_tuning.training.optimizer import SPREAD_ROWS, input_spread, parameter_groups
from router_tuning.training.processes import (
    Layout,
    any_process,
    check_engine,
    check_layout,
    layout_of,
)
from router_tuning.training.safety import (
    StopRequest,
    last_complete_checkpoint,
    stop_on_interrupt,
)
from router_tuning.training.shared_prefix import Prefix, capture_prefix, reuse_prefix
from router_tuning.training.warm_start import is_fresh, start_routers
from router_tuning.units import decoder_of, last_columns

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

__all__ = ["RouterTrainer", "RouterTrainerMixin", "RouterTrainingArguments"]

APART = (
    "this process stopped before the others knew, so nothing new was saved; "
    "resume_from_checkpoint=True continues from the last checkpoint on disk"
)


class RouterTrainerMixin(_Trainer):
    """Adds the budget term to a Trainer's loss, and looks after the routers' checkpoints."""

    args: RouterTrainingArguments
    arguments: type[RouterTrainingArguments] = RouterTrainingArguments
    """The class that `args` are of."""

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        args = self.arguments() if args is None else args
        check_arguments(args, self.arguments)
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        with plain_if_dequantised(model):
            super().__init__(model=model, args=args, **kwargs)
        check_engine(self.accelerator)
        check_model(self.routed, args)
        self._use_cache = use_cache
        self._folder = str(args.output_dir)
        routing = routing_of(self.routed)
        self.budget = check_budget(routing.config.budget if args.budget is None else args.budget)
        if args.objective == "distill":
            # Its loss is a mean of the micro-batch, not a sum over labels: the Trainer divides it.
            self.model_accepts_loss_kwargs = False
        self._running = RunningKept()
        self._good = RunningKept()  # as it was after the last complete step
        self._micro_batch = 0
        self._mid_update = False
        self._stop = StopRequest()
        self._sums: dict[str, float] = defaultdict(float)
        self._evaluated = [0.0, 0.0]
        self._head_checked = False
        self._predictions: Predictions | None = None
        self.add_callback(_StepWatch(self))

    @property
    def routed(self) -> nn.Module:
        """The model with the routers, not wrapped for several devices."""
        assert isinstance(self.model, nn.Module)
        return self.model

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, plus the budget term where gradients are wanted."""
        lowered = self._lowered(inputs)
        labels_BT = self.labels_of(inputs)
        with (
            record(self.routed) as trace,
            lowered_thresholds(self.routed, lowered),
            # The objectives' forwards get no labels, which say where prompts end.
            prompts_until(self.routed, None if labels_BT is None else label_starts(labels_BT)),
        ):
            task, outputs = self.task_loss(model, inputs, num_items_in_batch, return_outputs)
        if not trace.forwards:
            raise TrainingError(
                "the routers are switched off (disable_adapter?), so there is nothing to train"
            )
        kept = count_kept(_counted(trace.forwards), trace.num_units, lowered == 0, trace.prices)
        if torch.is_grad_enabled():
            # A loss over all tokens of the optimizer step is not divided by the Trainer; a mean is.
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = task + self._budget_loss(task * parts, kept) / parts
        else:
            self._evaluated = [
                self._evaluated[0] + kept.executions.item(),
                self._evaluated[1] + kept.possible.item(),
            ]
            loss = task
        return (loss, outputs) if return_outputs else loss

    def task_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """The objective without the budget, from one routed forward; and its outputs, which may be
        None unless they are asked for: some Trainers run the model again to make them.
        """
        if self.args.objective == "distill":
            return self._distill(model, inputs)
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if return_outputs else (loss, None)

    def labels_of(self, inputs: dict[str, Any]) -> Tensor | None:
        """The labels of a batch, which say where prompts end: (B, T). None where there are none."""
        return inputs.get("labels")

    def texts_of(self, inputs: dict[str, Any]) -> Tensor:
        """The number of the text that each row is, (B,), or that each token belongs to in packed
        rows, (B, T). Those of one number decide at one threshold.
        """
        rows = len(next(iter(inputs.values())))
        position_BT = inputs.get("position_ids")
        if position_BT is None or inputs.get("attention_mask") is not None:
            return torch.arange(rows)
        within_BT = packed_texts(position_BT.expand(rows, -1).cpu())
        if within_BT is None:
            return torch.arange(rows)
        ends_B = (within_BT[:, -1] + 1).cumsum(0)
        return within_BT + (ends_B - within_BT[:, -1] - 1)[:, None]

    def _lm(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Cross entropy to the labels, never with the logits of all positions at once."""
        if "labels" not in inputs:
            raise TrainingError(
                f'objective "lm" needs labels, but the batch has only {", ".join(inputs)}; add '
                'labels (-100 where there is no loss), or use objective "distill", which needs '
                "none"
            )
        inputs = dict(inputs)
        labels_BT = inputs.pop("labels")
        hidden_BTD, outputs = self._hidden(model, inputs)
        hidden_ND, target_N = shifted_targets(hidden_BTD, labels_BT)
        with self.accelerator.autocast():
            head = self._logits_of(hidden_BTD, outputs)
            loss = lm_loss(hidden_ND, target_N, head, predictions=self._predictions)
        if num_items_in_batch is None:
            return loss / max(len(target_N), 1), outputs
        # Counted over all ranks; data parallelism then takes the mean of the ranks' gradients.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * ranks / num_items_in_batch, outputs

    def _distill(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        labels_BT = inputs.get("labels", inputs.get("input_ids"))
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        teacher_BTD, prefix = self.teacher(inputs)
        with reuse_prefix(prefix):
            student_BTD, outputs = self._hidden(model, inputs)
        chosen_BT = self._choose(_real(inputs, student_BTD))
        with self.accelerator.autocast():
            head = self._logits_of(student_BTD, outputs)
            target_N = None if labels_BT is None else next_tokens(labels_BT)[chosen_BT]
            loss = distill_loss(
                student_BTD[chosen_BT],
                teacher_BTD[chosen_BT],
                head,
                target_N=target_N,
                lm_weight=self.args.lm_weight if torch.is_grad_enabled() else 0.0,
                predictions=self._predictions,
            )
        return loss, outputs

    def teacher(self, inputs: dict[str, Any]) -> tuple[Tensor, Prefix]:
        """Last hidden states of the dense model (without the adapter's LoRA, and without dropout),
        and what its lower layers gave.

        A subclass that has these hidden states already may return them with `Prefix([])`.
        """
        training = self.routed.training
        with torch.no_grad(), dense(self.routed), capture_prefix(self.routed) as prefix:
            self.routed.eval()
            try:
                hidden_BTD, _ = self._hidden(self.routed, inputs)
            finally:
                self.routed.train(training)
        return hidden_BTD, prefix

    def _hidden(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Last hidden states, and outputs with the logits of the last column only."""
        found: list[Tensor] = []
        decoder = decoder_of(self.routed)
        if getattr(decoder.config, "output_router_logits", False):
            # The objectives have no use for them.
            inputs = {**inputs, "output_router_logits": False}
        # Called through `model`, which may be wrapped, and caught at the decoder.
        handle = decoder.register_forward_hook(lambda module, args, output: found.append(output[0]))
        try:
            outputs = model(
                **inputs, logits_to_keep=last_columns(1, self.args.device), use_cache=False
            )
        finally:
            handle.remove()
        return found[0], outputs

    def _logits_of(self, hidden_BTD: Tensor, outputs: Any) -> Head:
        """The model's head, compared once with the model's own logits."""
        head = head_of(self.routed)
        if not self._head_checked:
            with torch.no_grad():
                check_head(
                    head(hidden_BTD[:, -1]).float(), outputs.logits[:, -1].float(), self.routed
                )
            self._head_checked = True
        return head

    def _choose(self, real_BT: Tensor) -> Tensor:
        """Where the KL is computed: all real positions, or a part that seed and step fix."""
        if self.args.distill_positions == 1.0 or not torch.is_grad_enabled():
            return real_BT
        generator = self._generator()
        flat_N = real_BT.flatten().nonzero()[:, 0]
        number = max(round(self.args.distill_positions * len(flat_N)), 1)
        picked = torch.randperm(len(flat_N), generator=generator)[:number].to(flat_N.device)
        chosen_N = torch.zeros(real_BT.numel(), dtype=torch.bool, device=real_BT.device)
        chosen_N[flat_N[picked]] = True
        return chosen_N.view_as(real_BT)

    def _lowered(self, inputs: dict[str, Any]) -> Tensor:
        """By how much thresholds are lowered, in training those of every second text: (B,), or
        (B, T) where rows are packed.
        """
        text = self.texts_of(inputs)
        lowered_S = torch.zeros(int(text.max()) + 1)
        if torch.is_grad_enabled():
            drawn_S = 1 - torch.rand(len(lowered_S), generator=self._generator())  # in (0, 1]
            lowered_S[1::2] = self.args.threshold_range * drawn_S[1::2]
        return lowered_S[text].to(self.args.device)

    def _generator(self) -> torch.Generator:
        """Random numbers that seed, step, micro-batch and rank fix, so that a resumed run draws the
        same.
        """
        key = (self.args.seed, self.state.global_step, self._micro_batch, self.args.process_index)
        return torch.Generator().manual_seed(hash(key) % 2**63)  # integers hash alike everywhere

    def _budget_loss(self, task: Tensor, kept: Kept) -> Tensor:
        args = self.args
        mine: list[float] = torch.stack(
            [kept.executions.detach(), kept.possible, task.detach().float()]
        ).tolist()
        executions, possible, tasks, asked = all_reduce_sum(
            [*mine, float(self._stop.asked)], task.device
        )
        self._stop.agreed = asked > 0
        mean_task = tasks / args.world_size
        if not math.isfinite(mean_task):
            self.stop_unstable(f"the loss became {mean_task} (kept {executions / possible:.3f})")
        target = target_at(
            self.state.global_step, self.state.max_steps, self.budget, args.anneal_fraction
        )
        if self._micro_batch == 0:
            self._running.fade(args.budget_momentum)
        running = self._running.add(executions, possible)
        loss = budget_term(kept.fraction, running, target, args.budget_weight)
        self._micro_batch += 1
        for name, value in (
            ("task_loss", mean_task),
            ("budget_loss", args.budget_weight * (running - target) ** 2),
            ("kept", executions / possible),
            ("target", target),
            ("number", 1.0),
        ):
            self._sums[name] += value
        return loss

    # ---- optimizer, evaluation, logs ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with learning rates for what moves a logit how far."""
        if self.optimizer is None:
            model = self.routed if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)  # type: ignore[arg-type]
            damped = isinstance(kwargs.get("eps"), float)
            groups = parameter_groups(self.routed, self.args, self._spreads(), damped=damped)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def _spreads(self) -> dict[str, float]:
        with self.compute_loss_context_manager():
            return input_spread(self.routed, self._first_rows(SPREAD_ROWS))

    def _first_rows(self, number: int) -> list[dict[str, Tensor]]:
        """The first training rows, each a batch of its own; none where they hold no token ids.

        Draws no random number of the sampler's. A data set that is a stream is begun once more.
        """
        if self.train_dataset is None:
            return []
        collate: Any = self.data_collator
        if self.args.remove_unused_columns:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        rows = itertools.islice(iter(self.train_dataset), number)
        batches = [collate([row]) for row in rows]
        return [batch for batch in batches if "input_ids" in batch]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of the arguments; the default stays constant and then cools down."""
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = given

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The objective on held-out data, also where it has no labels; without the budget term."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's, with the kept fraction among the metrics."""
        self._evaluated = [0.0, 0.0]
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        executions, possible = all_reduce_sum(self._evaluated, self.args.device)
        if possible:
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_kept"] = executions / possible
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the parts of the loss and what was kept: means since the last log."""
        if "learning_rate" in logs and self.optimizer is not None:  # of the first group
            logs["learning_rate"] *= self.optimizer.param_groups[0].get("divided_by", 1.0)
        number = self._sums.pop("number", 0.0)
        if "loss" in logs and number:
            logs.update({name: value / number for name, value in self._sums.items()})
            self._sums.clear()
        elif number:
            self._sums["number"] = number
        super().log(logs, *args, **kwargs)

    # ---- checkpoints ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` continues from the last complete checkpoint.

        Raises:
            TrainingError: a loss or gradient is not finite, there is nothing to resume from, or a
                checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C, after a checkpoint of the last complete step was saved.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._running = RunningKept.load(Path(checkpoint)) if checkpoint else RunningKept()
        if checkpoint:
            check_layout(Path(checkpoint), self._layout())
        self._good = replace(self._running)
        self._micro_batch, self._mid_update = 0, False
        self._sums.clear()
        config = routing_of(self.routed).config
        # Moved routers have no calibrated thresholds; training decides at the routers' own.
        config.calibration, config.default_budget = [], None
        try:
            if checkpoint is None and self.args.warm_start and is_fresh(self.routed):
                self._warm_start(self._first_rows(self.args.warm_start))
            with stop_on_interrupt(self._stop):
                output = super().train(checkpoint, *args, **kwargs)
                self.stop_if_asked()
            return output
        except KeyboardInterrupt:
            saved = self._keep_last_good() if self._stops_together() else APART
            raise KeyboardInterrupt(f"training stopped; {saved}") from None
        finally:
            if self._use_cache is not None:  # the Trainer switches it off
                self.routed.config.use_cache = self._use_cache  # type: ignore[union-attr]

    def _warm_start(self, rows: list[dict[str, Tensor]]) -> None:
        if not rows:
            return
        with (
            self.compute_loss_context_manager(),
            logging.tqdm(desc="Warm start", leave=False, disable=self.args.disable_tqdm) as shown,
        ):
            start_routers(
                self.routed,
                rows,
                self.budget,
                lambda done, total: _advance(shown, total),
                seed=self.args.seed,
            )

    def stop_if_asked(self) -> None:
        """Turn a Ctrl-C that was pressed during the last step into the exception: in all processes
        at the same step, or those left would wait for ever for the others.
        """
        if self._stop.agreed or (self._stop.asked and self.args.world_size == 1):
            raise KeyboardInterrupt

    def _stops_together(self) -> bool:
        return self.args.world_size == 1 or self._stop.agreed

    def _layout(self) -> Layout:
        return layout_of(self.args, str(self.accelerator.distributed_type.value))

    def stop_unstable(self, what: str) -> NoReturn:
        """Save the last good step, then say what went wrong and what to try."""
        args = self.args
        saved = self._keep_last_good()
        raise TrainingError(
            f"{what} in step {self.state.global_step + 1}; {saved}. Try a lower learning_rate (now "
            f"{args.learning_rate:g}) and bias_learning_rate (now {args.bias_learning_rate:g}), "
            f"{'float32 instead of half precision, ' if args.bf16 or args.fp16 else ''}or look for "
            "broken rows in the data"
        )

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        found = last_complete_checkpoint(self._folder) if asked is True else Path(str(asked))
        if found is None or not found.is_dir():
            raise TrainingError(
                "no complete checkpoint to resume from in "
                f"{self._folder if asked is True else asked}; train without "
                "resume_from_checkpoint to start anew"
            )
        return str(found)

    def _keep_last_good(self) -> str:
        """Make sure that the last complete step is saved; a sentence that says where."""
        step = self.state.global_step
        if step == 0:
            return "no step was completed, so nothing was saved"
        if self._mid_update:
            return (
                "the step was cut short while it changed the routers, so nothing new was saved; "
                "resume_from_checkpoint=True continues from the last checkpoint on disk"
            )
        if not isinstance(self.routed, PeftModel):
            return "nothing was saved, since the model is not a PEFT model"
        folder = Path(self._folder) / f"checkpoint-{step}"
        # Asked of all before one writes it: writing may take all of them.
        missing = last_complete_checkpoint(self._folder) != folder
        if any_process(missing, self.args.device):
            self._running = replace(self._good)
            self._save_checkpoint(self.model_wrapped, trial=None)
        return f"step {step} is saved in {folder}, resume_from_checkpoint=True continues from there"

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        existed = folder.exists()
        try:
            if self.args.should_save:
                # Before transformers' own files, the last of which marks a complete checkpoint.
                self._running.save(folder, **self._layout().to_json())
            super()._save_checkpoint(model, trial)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # a full disk shows as any of these
            if not existed and self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder}: "
                f"{error}; free space there or make it writable, then "
                "train(resume_from_checkpoint=True) continues from the last checkpoint that was "
                "written"
            ) from error


class RouterTrainer(RouterTrainerMixin, Trainer):
    """Trains the routers of a PEFT model, or (save_strategy="no") of a model after `attach`.

    >>> model = get_peft_model(model, RouterTuningConfig(granularity="attn_token", budget=0.8))
    >>> args = RouterTrainingArguments(output_dir="out", max_steps=120)
    >>> RouterTrainer(model, args, train_dataset=[{"input_ids": ids} for ids in windows]).train()
    """

    def task_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """As the mixin's, but cross entropy never makes the logits of all positions at once."""
        if (
            self.args.objective == "distill"
            or self.label_smoother is not None
            or self.compute_loss_func is not None
        ):
            return super().task_loss(model, inputs, num_items_in_batch, return_outputs)
        return self._lm(model, inputs, num_items_in_batch)


class _StepWatch(TrainerCallback):
    """Tells the trainer where in a step it is."""

    def __init__(self, trainer: RouterTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        check_checkpointing(self.trainer.routed)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_asked()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_asked()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_asked()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        # In fp16 the gradient scaler skips steps that overflow; that is how it finds its scale.
        if trainer.accelerator.scaler is None and not _finite_gradients(trainer.routed):
            trainer.stop_unstable("a gradient is not finite")
        trainer._mid_update = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._mid_update = False
        trainer._micro_batch = 0
        trainer._good = replace(trainer._running)


def _counted(forwards: list[ForwardRecord]) -> ForwardRecord:
    """The forward that the budget counts: the last that gradients go through, since a Trainer may
    run the model again for what it logs; the last of all where there are no gradients.
    """

    def trains(forward: ForwardRecord) -> bool:
        gates = [unit.soft_BT for unit in forward.units.values()]
        return any(gate is not None and gate.requires_grad for gate in gates)

    return ([forward for forward in forwards if trains(forward)] or forwards)[-1]


def _advance(shown: Any, total: int) -> None:
    shown.total = total
    shown.update(1)  # where progress bars are off it counts nothing, so ask it for no number


def _finite_gradients(model: nn.Module) -> bool:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return True
    return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def _real(inputs: dict[str, Any], hidden_BTD: Tensor) -> Tensor:
    """False at padding: (B, T)."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
    return mask.to(device=hidden_BTD.device, dtype=torch.bool)

"""The work of `tune`, in steps that `demo` takes too. Imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed

from router_tuning.attach import num_router_parameters, set_budget
from router_tuning.calibration import calibrate_windows
from router_tuning.cli.adapters import WORK
from router_tuning.cli.console import Bar, bar, warn
from router_tuning.cli.material import Material, Recipe
from router_tuning.cli.options import granularities_in, layers_in, names_in
from router_tuning.config import CALIBRATION_WINDOWS, RoutingConfig, threshold_for
from router_tuning.data import WindowDataset, Windows
from router_tuning.errors import BudgetError, ConfigError
from router_tuning.evaluation.perplexity import window_loss
from router_tuning.execution.context import dense, record, routing_of
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.record import kept_of_all
from router_tuning.training.safety import last_complete_checkpoint
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import ROWS, start_routers
from router_tuning.units import decoder_of

OBJECTIVE_WINDOWS = 8
"""Held-out windows of an evaluation during training: enough for a trend."""
ALL_LINEAR = "all-linear"
"""PEFT's word for LoRA on every linear layer."""
EVALUATIONS = 4
"""How often a training looks at held-out text."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the result of a tuning. One that is resumed must have the same."""

    model: str
    data: str | None = None
    granularity: str = "attn_token"
    kv: str = "kept"
    kv_sink: int = 0
    kv_window: int = 0
    layers: str | None = None
    decide_after: int = 32
    router: str = "linear"
    router_hidden: int = 32
    budget: float = 0.75
    budget_in: str = "executions"
    objective: str = "distill"
    answers_only: bool = False
    steps: int = 480
    batch_size: int = 2
    accumulate: int = 1
    length: int = 256
    learning_rate: float | None = None
    bias_learning_rate: float | None = None
    budget_weight: float | None = None
    threshold_range: float | None = None
    distill_positions: float | None = None
    lm_weight: float | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_target: str | None = None
    lora_learning_rate: float | None = None
    prompts: int = 300
    answer_tokens: int = 128
    own_text: float = 0.0
    held_out: int = CALIBRATION_WINDOWS
    dtype: str = "auto"
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> Settings:
        """From a verb's options, of which there may be more."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def routing(self) -> RoutingConfig:
        """The routing to tune, checked."""
        names = {field.name for field in fields(RoutingConfig)} - {"layers"}
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        chosen["granularity"] = granularities_in(self.granularity)
        config = RoutingConfig(**chosen, layers=layers_in(self.layers))
        config.check()
        self.lora()
        if self.answers_only and self.objective != "lm":
            raise ConfigError(
                f"--answers-only goes with --objective lm; {self.objective!r} compares with the "
                f"dense model at every token"
            )
        return config

    def lora(self) -> dict[str, Any] | None:
        """The LoRA to tune with the routers; None without."""
        if self.lora_r is None:
            for option in ("lora_alpha", "lora_target", "lora_learning_rate"):
                if getattr(self, option) is not None:
                    raise ConfigError(
                        f"--{option.replace('_', '-')} is of LoRA, which --lora-r asks for: give "
                        f"--lora-r 8 too, or leave it out"
                    )
            return None
        alpha = 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
        chosen: dict[str, Any] = {"r": self.lora_r, "lora_alpha": alpha}
        if self.lora_target == ALL_LINEAR:
            chosen["target_modules"] = ALL_LINEAR
        elif self.lora_target is not None:
            chosen["target_modules"] = list(names_in(self.lora_target))
        return chosen

    def recipe(self) -> Recipe:
        """The text to tune on."""
        windows = self.steps * self.batch_size * self.accumulate
        return Recipe(
            self.data,
            self.length,
            windows,
            self.held_out,
            self.prompts,
            self.answer_tokens,
            self.seed,
            own_text=self.own_text,
        )


def attach_routers(model: Any, settings: Settings) -> PeftModel:
    """Put fresh routers on a base model."""
    set_seed(settings.seed)
    config = settings.routing()
    names = {field.name for field in fields(RoutingConfig)}
    fresh = {name: value for name, value in vars(config).items() if name in names}
    return get_peft_model(model, RouterTuningConfig(**fresh, lora=settings.lora()))


def train(
    model: PeftModel,
    settings: Settings,
    material: Material,
    out: Path,
    *,
    evaluate: bool = True,
    save_every: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Train the routers, from the last checkpoint under `out` where there is one; returns the log.

    Raises:
        TrainingError: it cannot go on.
        KeyboardInterrupt: Ctrl-C; what was reached is saved.
    """
    checkpoint = last_complete_checkpoint(str(out / WORK))
    if checkpoint is None:
        rows = material.train.take(range(min(ROWS, len(material.train))))
        with bar("Finding how much the model needs each unit") as progress:
            batches = [{"input_ids": ids} for ids in rows.ids.split(1)]
            start_routers(model, batches, settings.budget, progress, seed=settings.seed)
    arguments = _arguments(model, settings, out, evaluate, save_every)
    with bar(f"Training {num_router_parameters(model)} router parameters") as progress:
        trainer = RouterTrainer(
            model,
            arguments,
            train_dataset=WindowDataset(material.train, answers_only=settings.answers_only),
            eval_dataset=WindowDataset(_first(material.held_out)) if evaluate else None,
            callbacks=[_Show(progress), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(None if checkpoint is None else str(checkpoint))
    model.eval()
    return [dict(entry) for entry in trainer.state.log_history]


def _arguments(
    model: PeftModel, settings: Settings, out: Path, evaluate: bool, save_every: int | None
) -> RouterTrainingArguments:
    names = (
        "learning_rate",
        "bias_learning_rate",
        "budget_weight",
        "threshold_range",
        "distill_positions",
        "lm_weight",
        "lora_learning_rate",
    )
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if save_every is not None:
        given["save_steps"] = save_every
    if evaluate:
        given["eval_strategy"] = "steps"
        given["eval_steps"] = max(settings.steps // EVALUATIONS, 1)
    device = next(model.parameters()).device
    return RouterTrainingArguments(
        output_dir=str(out / WORK),
        objective=settings.objective,
        budget=settings.budget,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        logging_steps=max(min(settings.steps // 12, 10), 1),
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
        **given,
    )


def _first(windows: Windows) -> Windows:
    return windows.take(range(min(OBJECTIVE_WINDOWS, len(windows))))


class _Show(TrainerCallback):
    """Moves the bar, and writes behind it what was logged last."""

    def __init__(self, progress: Bar) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = (("task_loss", "loss"), ("kept", "kept"), ("target", "aim"))
        parts = [f"{word} {logs[name]:.3f}" for name, word in shown if name in logs]
        if parts:
            self.progress.note(" ".join(parts))


def calibrate_what_can_be_met(
    model: Any, windows: Windows, budgets: Sequence[float], batch_size: int = 8
) -> list[float]:
    """Calibrate those of the budgets that can be met; returns the others, after a note about them.

    Raises:
        BudgetError: none can be met.
    """
    floor = always_run(model, windows)
    wanted = [b for b in budgets if b < 1.0]
    met = [b for b in wanted if b > floor]
    skipped = [b for b in wanted if b <= floor]
    if not met:
        raise BudgetError(
            f"{floor:.3f} of the executions run in any case (unrouted layers, and the first "
            f"tokens of a sequence where those decide), so none of the budgets "
            f"{_listed(wanted)} can be met; ask for larger ones or route more layers"
        )
    if skipped:
        warn(f"{floor:.3f} of the executions run in any case; not calibrated: {_listed(skipped)}")
    with bar(f"Calibrating {len(met)} budgets") as progress:
        calibrate_windows(model, windows, met, batch_size=batch_size, progress=progress)
    return skipped


def always_run(model: Any, windows: Windows) -> float:
    """The share of executions that no threshold prevents: unrouted layers, deciding prefixes."""
    decoder = decoder_of(model)
    ids = windows.ids[:1].to(next(decoder.parameters()).device)
    with torch.no_grad(), record(model) as trace:
        decoder(input_ids=ids, use_cache=False)
    always = {
        name: 0.0 if unit.always_BT is None else float(unit.always_BT.float().mean())
        for name, unit in trace.forwards[0].units.items()
    }
    return kept_of_all(always, trace.num_units, trace.prices)


def choose_default(model: Any, budget: float | None) -> None:
    """Make a budget that of calls which name none; no default, and a note, where it is not
    calibrated.
    """
    if budget is None or is_calibrated(model, budget):
        set_budget(model, budget)
        return
    set_budget(model, None)
    warn(
        f"budget {budget:g} is not calibrated, so the adapter has no default budget: calls that "
        f"name none run at the routers' own threshold"
    )


def is_calibrated(model: Any, budget: float | None) -> bool:
    """Whether a call may name this budget."""
    try:
        threshold_for(routing_of(model).config, budget)
    except BudgetError:
        return False
    return True


def budget_rows(model: Any, windows: Windows, batch_size: int = 8) -> list[dict[str, Any]]:
    """The calibration with the held-out loss at each budget, and over the dense model's."""
    entries = routing_of(model).config.calibration
    rows = []
    total = (1 + len(entries)) * len(windows)
    with bar("Measuring held-out loss") as progress:
        with dense(model):
            base = window_loss(model, windows, batch_size=batch_size).loss
        progress(len(windows), total)
        for number, entry in enumerate(reversed(entries), start=1):
            loss = window_loss(model, windows, batch_size=batch_size, budget=entry["budget"]).loss
            rows.append({**entry, "loss": loss, "loss_over_dense": loss - base})
            progress((number + 1) * len(windows), total)
    return rows


def calibrated_budgets(model: Any) -> list[float]:
    """The budgets that are calibrated, largest first."""
    return [float(e["budget"]) for e in reversed(routing_of(model).config.calibration)]


def remove_tuning(out: Path) -> None:
    """Delete what an earlier tuning left in a folder, and nothing else."""
    shutil.rmtree(out / WORK, ignore_errors=True)


def _listed(budgets: Sequence[float]) -> str:
    return ", ".join(f"{b:g}" for b in budgets)

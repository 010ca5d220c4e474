"""What `eval` measures: dense, routed, and with `--compare` every control. Imports torch.

Learned static dropping (routers of one number each, which see nothing of the text) is an adapter of
its own: it is loaded, or tuned here on the text of the adapter that is measured. It takes the place
of that adapter on the same base model, so no second model is held.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from router_tuning.adapter_folder import load_adapter
from router_tuning.cli import tuning
from router_tuning.cli.adapters import (
    ANSWERS,
    WORK,
    Loaded,
    default_recipe,
    record_of,
    text_held_back,
)
from router_tuning.cli.console import bar
from router_tuning.cli.material import Material, prepare
from router_tuning.cli.tuning import Settings
from router_tuning.config import CALIBRATION_WINDOWS, threshold_for
from router_tuning.data import Windows, load_examples, make_windows
from router_tuning.errors import ConfigError
from router_tuning.evaluation.perplexity import evaluate
from router_tuning.peft_config import RouterTuningConfig, check_weights_file


@dataclass(frozen=True)
class Controls:
    """What `--compare` was told."""

    selection_data: str | None
    """Text on which static dropping is chosen; None: what the adapter's tuning held back."""
    learned_static: str | None
    """A folder with static routers; None: they are tuned."""
    static_steps: int | None
    """Of that tuning, at most; None: as many as the adapter's, 0: leave it out."""
    seeds: Sequence[int]
    """Of the random masks."""


@dataclass(frozen=True)
class StaticTuning:
    """How to tune static routers, and on what text."""

    settings: Settings
    material: Material
    name: str
    """For people and records."""


def measure(
    loaded: Loaded,
    adapter: str,
    windows: Windows,
    budgets: Sequence[float],
    batch_size: int,
    controls: Controls | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON of `eval`, and the names of the text that the controls took. Uses up the adapter: at
    the end the base model holds the static routers, where there are any.
    """
    if controls is None:
        with bar(f"Evaluating {windows.num_tokens} tokens") as progress:
            result = evaluate(
                loaded.model, windows, budgets, batch_size=batch_size, progress=progress
            )
        return result, {}
    static = None
    tuned_here = controls.learned_static is None and controls.static_steps != 0
    if controls.learned_static is not None:
        _check_static(controls.learned_static, adapter, budgets)
    elif tuned_here and min(budgets) < 1:
        static = _plan(adapter, loaded, controls)
    selection, chosen_on = selection_text(controls, adapter, loaded, windows.ids.shape[1], static)
    with bar(f"Evaluating {windows.num_tokens} tokens, with controls") as progress:
        result = evaluate(
            loaded.model,
            windows,
            budgets,
            batch_size=batch_size,
            compare=True,
            selection=selection,
            seeds=controls.seeds,
            progress=progress,
        )
    names = {"selection": chosen_on}
    base = loaded.model.unload()
    if static is not None:
        names["learned_static"] = f"{static.settings.steps} steps on {static.name}"
        routed = _tune(base, static, budgets)
    elif controls.learned_static is not None:
        names["learned_static"] = controls.learned_static
        routed = load_adapter(controls.learned_static, base).eval()
    elif tuned_here:
        names["learned_static"] = "not tuned: a budget of 1 keeps every unit"
        return {**result, "learned_static": [_dense_row(result["dense"])]}, names
    else:
        return result, names
    return {**result, "learned_static": _rows(routed, windows, budgets, batch_size)}, names


def _dense_row(dense: dict[str, Any]) -> dict[str, Any]:
    """The row of a budget of 1."""
    shares = dict.fromkeys(("budget", "kept_fraction", "kept_of_routed", "flops_fraction"), 1.0)
    return {**shares, "loss": dense["loss"], "answer_loss": dense["answer_loss"]}


def _rows(
    model: Any, windows: Windows, budgets: Sequence[float], batch_size: int
) -> list[dict[str, Any]]:
    """An adapter's rows, at those of the budgets that it can serve."""
    met = [b for b in budgets if tuning.is_calibrated(model, b)]
    with bar("Evaluating learned static dropping") as progress:
        result = evaluate(model, windows, met, batch_size=batch_size, progress=progress)
    rows: list[dict[str, Any]] = result["routed"]
    return rows


def selection_text(
    controls: Controls,
    adapter: str,
    loaded: Loaded,
    length: int,
    static: StaticTuning | None = None,
) -> tuple[Windows, str]:
    """Windows on which static dropping is chosen, and their name."""
    if controls.selection_data is not None:
        examples = load_examples(controls.selection_data)
        windows = make_windows(loaded.tokenizer, examples, length=length, limit=CALIBRATION_WINDOWS)
        return windows, controls.selection_data
    if static is not None:  # the same text, read or sampled already
        return static.material.held_out, f"held back of {static.name}"
    return text_held_back(adapter, loaded, seed=controls.seeds[0])


def _check_static(folder: str, adapter: str, budgets: Sequence[float]) -> None:
    """Before hours of work: whether the folder can serve as the control.

    Raises:
        ConfigError: its routers are not static, or it belongs to another base model.
        BudgetError: a budget is not calibrated.
        AdapterError: its weights are damaged.
    """
    config = RouterTuningConfig.from_pretrained(folder)
    if config.router != "bias":
        raise ConfigError(
            f"--learned-static {folder} has {config.router} routers; wanted an adapter tuned with "
            f"--router bias"
        )
    other = RouterTuningConfig.from_pretrained(adapter).base or {}
    ours = config.base or {}
    told = ("model_type", "hidden_size", "num_layers", "vocab_size", "fingerprint")
    if any(ours.get(name) != other.get(name) for name in told):
        raise ConfigError(
            f"--learned-static {folder} was tuned on {ours.get('name') or 'another model'}, and "
            f"{adapter} on {other.get('name') or 'a model without a name'}; wanted the same "
            f"base model"
        )
    check_weights_file(folder)
    for budget in budgets:
        threshold_for(config, budget)


def _plan(folder: str, loaded: Loaded, controls: Controls) -> StaticTuning:
    """The adapter's own tuning with static routers, on the same text."""
    record = record_of(folder)
    settings = replace(_settings(folder, record, loaded.name), router="bias")
    if controls.static_steps is not None:
        settings = replace(settings, steps=min(controls.static_steps, settings.steps))
    if record is None:
        recipe = replace(
            default_recipe(controls.seeds[0]), windows=settings.steps * settings.batch_size
        )
    else:
        recipe = record["recipe"]  # whole: what it holds back depends on how much it trains on
    kept = Path(folder) / WORK / ANSWERS
    material = prepare(
        recipe, loaded.model, loaded.tokenizer, answers=kept if kept.is_file() else None
    )
    return StaticTuning(settings, material, recipe.name)


def _tune(base: Any, static: StaticTuning, budgets: Sequence[float]) -> Any:
    """Static routers on a base model, tuned and calibrated."""
    model = tuning.attach_routers(base, static.settings)
    with tempfile.TemporaryDirectory() as folder:
        tuning.train(model, static.settings, static.material, Path(folder), evaluate=False)
    held_out, batch_size = static.material.held_out, static.settings.batch_size
    tuning.calibrate_what_can_be_met(model, held_out, budgets, batch_size)
    return model


def _settings(folder: str, record: dict[str, Any] | None, model: str) -> Settings:
    """How an adapter was tuned, from the record beside it; without one, from its config."""
    if record is not None:
        found = record["settings"]
    else:
        config = RouterTuningConfig.from_pretrained(folder)
        layers = None if config.layers is None else ",".join(map(str, config.layers))
        granularity = ",".join(config.granularities)
        found = {**vars(config), "layers": layers, "granularity": granularity}
    names = {field.name for field in fields(Settings)}
    return Settings(**{k: v for k, v in found.items() if k in names} | {"model": model})

"""What `analyse` runs: each adapter in turn on one base model, and the start. Imports torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model

from router_tuning.adapter_folder import load_adapter
from router_tuning.cli.adapters import Loaded
from router_tuning.cli.console import bar
from router_tuning.config import threshold_for
from router_tuning.data import Example, Windows, make_windows
from router_tuning.errors import BaseModelMismatchError, ConfigError
from router_tuning.evaluation.expert_analysis import ExpertCounts, count_experts
from router_tuning.evaluation.routing_analysis import (
    Decisions,
    DomainText,
    decide,
    read_text,
    routing,
)
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.training.warm_start import start_routers

BASE = ("model_type", "hidden_size", "num_layers", "vocab_size", "fingerprint")
"""What tells one base model from another."""
WHICH = ("granularity", "layers")
"""What decides which units are routed."""
HOW = (
    "kv",
    "kv_sink",
    "kv_window",
    "pooling",
    "decide_after",
    "router",
    "router_hidden",
    "budget_in",
)
"""What decides a start, beside that and the text."""


@dataclass(frozen=True)
class Asked:
    """How decisions are made: see `decide`. And whether tokens of experts are counted."""

    budget: float
    calibrated: bool
    batch_size: int
    experts: bool


@dataclass(frozen=True)
class Found:
    """What one model decided, and which experts it used, where that was asked for."""

    decisions: Decisions
    experts: ExpertCounts | None


def configs_of(folders: Sequence[str]) -> list[RouterTuningConfig]:
    """The adapters' configs, before anything is loaded.

    Raises:
        AdapterError: no adapter.
        BaseModelMismatchError: they belong to different models.
        ConfigError: they route different units.
    """
    configs = [RouterTuningConfig.from_pretrained(folder) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders, configs, strict=True):
        if any((first.base or {}).get(name) != (config.base or {}).get(name) for name in BASE):
            raise BaseModelMismatchError(
                f"adapters are compared on one base model; {folders[0]} was tuned on "
                f"{first.base_model_name}, {folder} on {config.base_model_name} or on other "
                f"weights of it: analyse them one by one"
            )
        _check_same(folders[0], first, folder, config, WHICH, "decisions about the same units")
    return configs


def check_one_start(folders: Sequence[str], configs: Sequence[RouterTuningConfig]) -> None:
    """ConfigError where one start cannot be that of all adapters."""
    for folder, config in zip(folders, configs, strict=True):
        _check_same(folders[0], configs[0], folder, config, HOW, "one start")


def check_calibrated(configs: Sequence[RouterTuningConfig], budget: float) -> None:
    """BudgetError where an adapter has no threshold for a budget."""
    for config in configs:
        threshold_for(config, budget)


def _check_same(
    a_folder: str,
    a: RouterTuningConfig,
    b_folder: str,
    b: RouterTuningConfig,
    names: Sequence[str],
    wanted: str,
) -> None:
    for name in names:
        if getattr(a, name) != getattr(b, name):
            raise ConfigError(
                f"wanted adapters that have {wanted}, but {a_folder} has {name} "
                f"{getattr(a, name)!r} and {b_folder} {getattr(b, name)!r}: analyse them one by one"
            )


def text_of(loaded: Loaded, domains: Mapping[str, Windows], batch_size: int) -> DomainText:
    """The domains' text, read by the dense model."""
    tokens = sum(windows.num_tokens for windows in domains.values())
    with bar(f"Reading {tokens} tokens, dense") as progress:
        return read_text(
            loaded.model, loaded.tokenizer, domains, batch_size=batch_size, progress=progress
        )


def of_dense(loaded: Loaded, text: DomainText, asked: Asked) -> ExpertCounts:
    """Which experts the dense model uses."""
    return _experts(loaded.model, "the dense model", text, None, asked)


def of_adapter(loaded: Loaded, folder: str, name: str, text: DomainText, asked: Asked) -> Found:
    """What an adapter decides. The base model is as it was then."""
    routed = load_adapter(folder, loaded.model).eval()
    try:
        return _found(routed, name, text, asked)
    finally:
        routed.unload()


def of_start(
    loaded: Loaded,
    like: RouterTuningConfig,
    rows: Windows,
    seed: int,
    text: DomainText,
    asked: Asked,
) -> Found:
    """What routers decide that were fitted to the rows, as before the first step of a training.
    LoRA, which begins as nothing, is left out.
    """
    same = {name: getattr(like, name) for name in (*WHICH, *HOW, "init_bias")}
    routed: Any = get_peft_model(loaded.model, RouterTuningConfig(**same)).eval()
    try:
        with bar(f"Fitting the start to {rows.num_tokens} tokens") as progress:
            inputs = [{"input_ids": ids_L[None]} for ids_L in rows.ids]
            start_routers(routed, inputs, like.budget, progress, seed=seed)
        return _found(routed, "the start", text, asked)
    finally:
        routed.unload()


def start_rows_of(
    loaded: Loaded, examples: list[Example], length: int, rows: int, seed: int
) -> Windows:
    """Windows of the training text in a random order, as a training meets them."""
    random.Random(seed).shuffle(examples)
    return make_windows(loaded.tokenizer, examples, length=length, limit=rows)


def _found(routed: Any, name: str, text: DomainText, asked: Asked) -> Found:
    with bar(f"Routing by {name}") as progress:
        decisions = decide(
            routed,
            text,
            asked.budget,
            calibrated=asked.calibrated,
            batch_size=asked.batch_size,
            progress=progress,
        )
    experts = _experts(routed, name, text, decisions, asked) if asked.experts else None
    return Found(decisions, experts)


def _experts(
    model: Any, name: str, text: DomainText, decisions: Decisions | None, asked: Asked
) -> ExpertCounts:
    with bar(f"Counting tokens of experts, {name}") as progress:
        return count_experts(model, text, decisions, batch_size=asked.batch_size, progress=progress)


def text_entry(text: DomainText) -> dict[str, dict[str, Any]]:
    """The JSON's part about the text."""
    return {
        name: {
            "windows": len(text.windows.ids[at]),
            "tokens": text.windows.ids[at].numel(),
            "dense_loss": text.loss[name],
        }
        for name, at in text.domains.items()
    }


def routed_entry(
    name: str, config: RouterTuningConfig, decisions: Decisions, text: DomainText
) -> dict[str, Any]:
    """The JSON's part about an adapter, or about the start."""
    told = {
        field: getattr(config, field) for field in ("granularity", "kv", "kv_sink", "kv_window")
    }
    return {"name": name, **told, **routing(decisions, text)}

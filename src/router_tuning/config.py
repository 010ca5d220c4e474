"""What a routed model is: the fields that an adapter saves beside its weights, and their checks.

Imports no torch, so a config can be read and checked anywhere. Options of one act (training,
calibration) live beside that act.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from router_tuning.errors import BudgetError, ConfigError

FORMAT_VERSION = 1
GRANULARITIES = (
    "attn_token",
    "attn_sequence",
    "mlp_token",
    "mlp_sequence",
    "block_token",
    "block_sequence",
)
ROUTERS = ("linear", "bottleneck", "bias")
KV_POLICIES = ("all", "kept")
POOLINGS = ("prefix", "prompt", "official")
BUDGETS_IN = ("executions", "flops")
CALIBRATION_WINDOWS = 64
"""Held-out windows that thresholds are chosen on, at most, unless told otherwise. With sixteen,
other text of the same kind came out up to 0.03 off its budget.
"""
ROUNDING = 1e-6
"""A budget that far outside the calibrated range is inside: it may come from float32."""


@dataclass(kw_only=True)
class RoutingConfig:
    """What is routed, by which routers, and under which key/value policy."""

    granularity: str | list[str] = "attn_token"
    """Which units decide, and for what: one of the paper's six names, or a list of them."""

    layers: list[int] | None = None
    """Indices of the routed decoder layers. None routes all of them; an empty list is an error."""

    kv: str = "kept"
    """Keys and values of skipped tokens: "kept" writes none, "all" writes every token's."""

    kv_sink: int = 0
    """With kv="kept": the first kv_sink tokens of a sequence stay visible although skipped (>=
    0).
    """

    kv_window: int = 0
    """With kv="kept": the latest kv_window tokens stay visible although skipped (>= 0)."""

    pooling: str = "prefix"
    """Sequence granularities: "prefix" lets the mean logit of the first decide_after tokens decide
    once, for what follows; "prompt" that of the whole prompt, for the prompt and all that follows.
    "official" is for comparison with the official code alone, whose rule it is: the mean over all
    that a forward is given, the answer and the padding included.
    """

    decide_after: int = 32
    """With pooling="prefix": how many real tokens always run before the decision (>= 1)."""

    router: str = "linear"
    """"linear": one map to a logit; "bottleneck": a small MLP; "bias": one learned number a unit
    (static).
    """

    router_hidden: int = 32
    """Width of the bottleneck router (>= 1)."""

    init_bias: float = 1.0
    """Logit of a fresh router (> 0, so that a fresh router keeps everything)."""

    budget: float = 0.8
    """The kept fraction that training aims at, in (0, 1]."""

    budget_in: str = "executions"
    """What kept fractions count: "executions", each unit's alike; or "flops", each weighed with
    what skipping it would save (prices.py), so that training decides whether to save in attentions
    or in MLPs.
    """

    default_budget: float | None = None
    """Budget of a call that names none. None uses the routers' own threshold of 0."""

    calibration: list[dict[str, Any]] = field(default_factory=list)
    """One entry a calibrated budget: {"budget", "threshold", "kept_fraction", "kept_of_routed",
    "kept_per_unit"}. Empty until `calibrate` has run."""

    base: dict[str, Any] | None = None
    """Identity of the base model (see identity.py). None until the routers are attached."""

    format_version: int = FORMAT_VERSION
    """Version of this format; a newer one than the package knows is refused."""

    def check(self) -> None:
        """Raise ConfigError, naming the field, if a value is out of range or does not go with
        another.
        """
        _check_names(self)
        _check_numbers(self)
        _check_layers(self.layers)
        _check_calibration(self.calibration)
        if self.base is not None and not isinstance(self.base, dict):
            raise ConfigError(
                f"base must be the base model's identity (a dict), or None; got {self.base!r}"
            )
        if self.kv == "all" and (self.kv_sink or self.kv_window):
            raise ConfigError(
                f'kv_sink and kv_window go with kv="kept"; with kv="all" every key is visible. '
                f"Got kv_sink={self.kv_sink}, kv_window={self.kv_window}: set both to 0."
            )

    @property
    def granularities(self) -> tuple[str, ...]:
        """The granularities as a tuple, also where one name was given."""
        return (self.granularity,) if isinstance(self.granularity, str) else tuple(self.granularity)


def _check_names(config: RoutingConfig) -> None:
    if not isinstance(config.granularity, (str, list, tuple)):
        raise ConfigError(
            f"granularity must be a name, or a list of names, of {', '.join(GRANULARITIES)}; got "
            f"{config.granularity!r}"
        )
    if not config.granularities:
        raise ConfigError("granularity must name at least one of " + ", ".join(GRANULARITIES))
    for name in config.granularities:
        if name not in GRANULARITIES:
            raise ConfigError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {name!r}"
            )
    kinds = [name.partition("_")[0] for name in config.granularities]
    for name, kind in zip(config.granularities, kinds, strict=True):
        if kinds.count(kind) > 1:
            raise ConfigError(
                f"a unit decides by token or by sequence, so granularity may name one of each "
                f"kind; got {', '.join(config.granularities)}, of which {name!r} is not alone"
            )
    if "block" in kinds and len(kinds) > 1:
        raise ConfigError(
            "a block holds its layer's attention and MLP, so it is routed alone; got "
            f"{', '.join(config.granularities)}"
        )
    for name, value, allowed in (
        ("kv", config.kv, KV_POLICIES),
        ("pooling", config.pooling, POOLINGS),
        ("budget_in", config.budget_in, BUDGETS_IN),
        ("router", config.router, ROUTERS),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_numbers(config: RoutingConfig) -> None:
    for name, low in (
        ("kv_sink", 0),
        ("kv_window", 0),
        ("decide_after", 1),
        ("router_hidden", 1),
        ("format_version", 1),
    ):
        value = getattr(config, name)
        if type(value) is not int or value < low:
            raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if not _is_number(config.init_bias) or not 0 < config.init_bias < math.inf:
        raise ConfigError(
            f"init_bias must be positive and finite, so that fresh routers keep everything; "
            f"got {config.init_bias!r}"
        )
    _check_budget_of("budget", config.budget)
    if config.default_budget is not None:
        _check_budget_of("default_budget", config.default_budget)
    if config.format_version > FORMAT_VERSION:
        raise ConfigError(
            f"this adapter has format version {config.format_version}, newer than the "
            f"{FORMAT_VERSION} "
            f"that this version of router-tuning reads; upgrade router-tuning"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_budget_of(name: str, budget: float) -> None:
    try:
        check_budget(budget)
    except BudgetError as error:
        raise BudgetError(f"{name}: {error}") from error


def _check_layers(layers: list[int] | None) -> None:
    if layers is None:
        return
    if not isinstance(layers, (list, tuple)) or any(type(index) is not int for index in layers):
        raise ConfigError(
            f"layers must be a list of whole numbers (indices of decoder layers), or None for all "
            f"layers; got {layers!r}"
        )
    if not layers:
        raise ConfigError("layers is empty: name at least one layer index, or None for all layers")


def _check_calibration(calibration: list[dict[str, Any]]) -> None:
    if not isinstance(calibration, (list, tuple)):
        raise ConfigError(
            f"calibration must be a list with one entry a budget, as calibrate() makes it (empty "
            f"before), got {calibration!r}"
        )
    for number, entry in enumerate(calibration):
        name = f"calibration[{number}]"
        if not isinstance(entry, dict) or not {"budget", "threshold"} <= entry.keys():
            raise ConfigError(
                f'{name} must be a dict with at least "budget" and "threshold", got {entry!r}; '
                f"calibrate again"
            )
        _check_budget_of(f"{name} budget", entry["budget"])
        if not _is_number(entry["threshold"]) or math.isnan(entry["threshold"]):
            raise ConfigError(
                f"{name} threshold must be a number, got {entry['threshold']!r}; calibrate again"
            )


def check_budget(budget: float) -> float:
    """Return the budget as a float; BudgetError unless it is a number in (0, 1]."""
    if not _is_number(budget) or not 0.0 < budget <= 1.0:
        raise BudgetError(
            "a budget is the fraction of unit executions to keep, above 0 and at most 1; got "
            f"{budget!r}"
        )
    return float(budget)


def threshold_for(config: RoutingConfig, budget: float | None) -> float:
    """The logit at and above which a unit runs, for a budget.

    None takes the config's default budget, and the routers' own threshold of 0 if there is none. A
    budget of 1 keeps everything. Between calibrated budgets the threshold is interpolated linearly.

    Raises:
        BudgetError: out of (0, 1], not calibrated, or outside the calibrated range.
    """
    if budget is None:
        budget = config.default_budget
    if budget is None:
        return 0.0
    budget = check_budget(budget)
    if budget == 1.0:
        return -math.inf
    points = sorted((float(e["budget"]), float(e["threshold"])) for e in config.calibration)
    if not points:
        raise BudgetError(
            f"budget {budget:g} asked, but no budget is calibrated; run calibrate(model, "
            "tokenizer, held_out) "
            f"or `router-tuning calibrate`, or give no budget to use the routers' own threshold"
        )
    known = [b for b, _ in points]
    if not known[0] - ROUNDING <= budget <= known[-1] + ROUNDING:
        raise BudgetError(
            f"budget {budget:g} is outside the calibrated range {known[0]:g} to {known[-1]:g} "
            f"(1.0 keeps everything); calibrate it first"
        )
    right = min(max(bisect_left(known, budget), 1), len(points) - 1) if len(points) > 1 else 0
    (b0, t0), (b1, t1) = points[max(right - 1, 0)], points[right]
    return t1 if b0 == b1 else t0 + (t1 - t0) * (budget - b0) / (b1 - b0)

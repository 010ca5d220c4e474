"""The mean of several adapters' routers, as one adapter.

Trainings of one recipe with different seeds start from nearly the same fit of the routers and end
near each other, so the mean of their weights routes as each of them does, with less of what each
learned from the order of its data (model soups: Wortsman et al., ICML 2022; decision 0013). It
costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from router_tuning.adapter_folder import load_adapter
from router_tuning.errors import AdapterError
from router_tuning.execution.context import routing_of

ALIKE = (
    *("granularity", "layers", "kv", "kv_sink", "kv_window", "pooling", "decide_after"),
    *("router", "router_hidden", "lora"),
)
"""What adapters must agree in. They may be tuned to different budgets."""
OTHER = "averaged-in"


def average_adapters(folders: Sequence[str | Path], model: nn.Module | None = None) -> PeftModel:
    """Load adapters and put the mean of their routers into the first.

    Thresholds of the parts do not fit the mean: calibrate it before use.

    Args:
        folders: two adapters or more, of the same base model, routing the same units in the same
            way.
        model: the base model; None loads the one that the first adapter names.

    Raises:
        AdapterError: fewer than two adapters, adapters that differ in what they route or how, or
            with LoRA, whose product is not the product of the means.
        BaseModelMismatchError: an adapter of another model.
    """
    if len(folders) < 2:
        raise AdapterError(f"a mean takes two adapters or more, got {len(folders)}")
    routed = load_adapter(folders[0], model)
    name, config = str(routed.active_adapter), routing_of(routed).config
    _check_no_lora(config, folders[0])
    total = get_peft_model_state_dict(routed, adapter_name=name)
    for folder in folders[1:]:
        load_adapter(folder, routed, adapter_name=OTHER)
        try:
            _check_alike(config, routing_of(routed).config, folders[0], folder)
            other = get_peft_model_state_dict(routed, adapter_name=OTHER)
            total = {key: total[key] + other[key] for key in total}
        finally:
            routed.delete_adapter(OTHER)
            routed.set_adapter(name, inference_mode=True)
    mean = {key: weight / len(folders) for key, weight in total.items()}
    set_peft_model_state_dict(routed, mean, adapter_name=name)
    config.calibration, config.default_budget = [], None
    return routed


def _check_no_lora(config: Any, folder: str | Path) -> None:
    if config.lora is not None:
        raise AdapterError(
            f"{folder} has LoRA, whose product is not the product of the means; average adapters "
            f"of routers alone"
        )


def _check_alike(ours: Any, theirs: Any, our_folder: str | Path, their_folder: str | Path) -> None:
    differ = [name for name in ALIKE if getattr(ours, name) != getattr(theirs, name)]
    if differ:
        said = ", ".join(
            f"{name} ({getattr(ours, name)!r} and {getattr(theirs, name)!r})" for name in differ
        )
        raise AdapterError(
            f"{our_folder} and {their_folder} differ in {said}; average adapters of one recipe"
        )

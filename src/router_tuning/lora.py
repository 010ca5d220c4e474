"""LoRA inside a router-tuning adapter: what may be asked of it, and how its layers behave.

The layers are PEFT's own; here they learn three things. They are part of the routers' adapter: it
alone says which of them are active and trained. They are off wherever the routers are off, inside
`dense(model)` too, so that the dense model is the base model to the bit; that is looked up in each
forward and stands on no layer. And they go away without a trace. A LoRA that somebody else puts on
the same model is another adapter, of which nothing here knows.

Knows modules and what PEFT makes public. How an adapter is injected, saved and loaded stands in
peft_tuner.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from numbers import Real
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from torch import nn

from router_tuning.errors import ConfigError
from router_tuning.execution.context import runs_dense
from router_tuning.units import decoder_of

OPTIONS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""What `lora` may say, under PEFT's names and with PEFT's meanings and defaults."""
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Of these, what says where LoRA goes."""
LORA_WEIGHTS = ("lora_A", "lora_B")
"""What a LoRA layer calls its weights, by adapter name."""
INITIAL = (True, False, "gaussian")
"""How LoRA may start. PEFT's other ways change the base model's weights, or need data."""


class _OwnConfig(LoraConfig):
    """A LoraConfig made here, which a layer tells from somebody else's."""


def plain_options(lora: Mapping[str, Any] | LoraConfig) -> dict[str, Any]:
    """What was asked of LoRA as plain JSON values, checked. A whole LoraConfig, or its fields, may
    be given where what is not supported stands at its default.

    Raises:
        ConfigError: an option that LoraConfig does not have, or that is not supported or out of
            range.
    """
    whole: Any = lora
    given = whole.to_dict() if isinstance(lora, LoraConfig) else whole
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"lora must be a dict such as {{'r': 8, 'target_modules': ['q_proj', 'v_proj']}}, or "
            f"None for no LoRA; got {lora!r}"
        )
    known = {f.name: f for f in fields(LoraConfig)}
    of_any_adapter = {f.name for f in fields(PeftConfig)}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"lora has no option {name!r}; there are {', '.join(OPTIONS)}")
        if name in OPTIONS:
            chosen[name] = _plain(value)
        elif name not in of_any_adapter and value != _default(known[name]):
            raise ConfigError(
                f"lora with {name}={value!r} is not supported beside routers; there are "
                f"{', '.join(OPTIONS)}"
            )
    _check_values(chosen)
    lora_config(chosen, chosen.get("target_modules"))
    return chosen


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_values(chosen: Mapping[str, Any]) -> None:
    rank, alpha = chosen.get("r", 8), chosen.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"lora r must be a whole number of at least 1, got {rank!r}")
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise ConfigError(f"lora lora_alpha must be positive and finite, got {alpha!r}")
    dropout = chosen.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ConfigError(f"lora lora_dropout must be at least 0 and below 1, got {dropout!r}")
    start = chosen.get("init_lora_weights", True)
    if not any(start is known or start == known == "gaussian" for known in INITIAL):
        raise ConfigError(
            f"lora init_lora_weights must be one of {', '.join(map(repr, INITIAL))}, since the "
            f"base model stays as it is; got {start!r}"
        )
    names = chosen.get("target_modules")
    if names is not None and not _are_names(names):
        raise ConfigError(
            f"lora target_modules must be a list of names, one pattern, or None for PEFT's choice; "
            f"got {names!r}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_names(names: object) -> bool:
    if isinstance(names, str):
        return bool(names)
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)


def lora_config(
    chosen: Mapping[str, Any], names: Sequence[str] | str | None, inference_mode: bool = False
) -> LoraConfig:
    """PEFT's config for LoRA on modules of these names.

    Raises:
        ConfigError: PEFT finds options that do not go together.
    """
    try:
        return _OwnConfig(
            **{**chosen, "target_modules": names}, task_type=None, inference_mode=inference_mode
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora={dict(chosen)!r}: {error}") from error


_Layer: Any = object


class RoutedLora(_Layer):  # type: ignore[misc]
    """What PEFT's LoRA layers have to know of a router-tuning adapter: mixed in front of them."""

    of_routed_adapter = True
    """A dense forward runs `base_layer` alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output and LoRA's; in a dense forward, the base layer's."""
        if runs_dense(self.__dict__["decoder"]):
            return self.base_layer(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def activate(self, names: list[str], inference_mode: bool) -> None:
        """Make LoRA of these adapters active, and trainable unless inference_mode."""
        super().set_adapter(names, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Do nothing: another LoRA on the same model calls this for itself. See activate."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch LoRA on or off; what can be trained stays as it was."""
        self._disable_adapters = not enabled

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add LoRA of another router-tuning adapter; one that comes alone is refused.

        Raises:
            ConfigError: see above.
        """
        if not isinstance(kwargs.get("config"), _OwnConfig):
            raise ConfigError(
                f"a router-tuning adapter has its own LoRA on a module that LoRA {adapter_name!r} "
                f"asks for too; give that one other target_modules, or begin with the base model "
                f"and put routers without `lora` over its LoRA"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own rounds what was just loaded (low_cpu_mem_usage) to the base layer's dtype.
        place = device or next(self.base_layer.parameters()).device
        for parts in (getattr(self, name) for name in LORA_WEIGHTS):
            if adapter_name in parts and not any(p.is_meta for p in parts.parameters()):
                parts[adapter_name].to(place)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: another LoRA on the same model calls this when it merges itself."""

    def unmerge(self) -> None:
        """Do nothing, see merge."""

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> RoutedLora:
        """Stay: another LoRA on the same model calls this when it is taken off."""
        return self


@functools.cache
def _routed_class(kind: type) -> type:
    """A kind of PEFT's LoRA layers, with what these have to know."""
    return type(f"Routed{kind.__name__}", (RoutedLora, kind), {"__module__": __name__})


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers of the LoRA of router-tuning adapters, of all adapters."""
    return [module for module in model.modules() if isinstance(module, RoutedLora)]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains in the LoRA of the active router-tuning adapter."""
    return [
        parameter
        for layer in lora_layers(model)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    ]


class _Injector(LoraModel):
    """PEFT's tuner, which puts LoRA layers into a model and is then forgotten."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Leave the layers of others as they are."""
        self.active_adapter = adapter_name


def put_lora(
    model: nn.Module,
    adapter_name: str,
    chosen: Mapping[str, Any],
    targets: Sequence[str],
    low_cpu_mem_usage: bool = False,
) -> None:
    """Put an adapter's LoRA on the modules of these names; on an error there is none.

    Raises:
        ConfigError: PEFT has no LoRA for one of them.
    """
    where = {name: value for name, value in chosen.items() if name not in PLACES}
    config = lora_config(where, list(targets))
    training = {name: model.get_submodule(name).training for name in targets}
    try:
        with _without_its_configs(model):
            _Injector(model, config, adapter_name, low_cpu_mem_usage)
    except (ValueError, TypeError) as error:
        _own_layers(model, targets)
        drop_lora(model, adapter_name)
        raise ConfigError(f"lora={dict(chosen)!r} does not fit the model: {error}") from error
    _own_layers(model, targets)
    for name, mode in training.items():  # a new module trains, whatever its model does
        model.get_submodule(name).train(mode)


def _own_layers(model: nn.Module, targets: Sequence[str]) -> None:
    """Make the LoRA layers that were put on these modules ours."""
    decoder = decoder_of(model)
    for name in targets:
        layer: Any = model.get_submodule(name)
        if hasattr(layer, "lora_A") and not isinstance(layer, RoutedLora):
            layer.__class__ = _routed_class(type(layer))  # type: ignore[arg-type]
            layer.__dict__["decoder"] = decoder  # not as a child, whose child this is


@contextmanager
def _without_its_configs(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has no list of its adapters, into which PEFT would write LoRA as
    one more.
    """
    before = model.__dict__.pop("peft_config", None)
    try:
        yield
    finally:
        model.__dict__.pop("peft_config", None)
        if before is not None:
            model.__dict__["peft_config"] = before


def activate_lora(model: nn.Module, names: list[str], inference_mode: bool) -> None:
    """Make the LoRA of these adapters active in the whole model, and no other's of ours."""
    for layer in lora_layers(model):
        layer.activate(names, inference_mode)


def drop_lora(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's LoRA; a module that is left without any is the base model's own again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, RoutedLora) or adapter_name not in layer.lora_A:
                continue
            if adapter_name in layer.active_adapters:
                layer.activate([], True)  # else PEFT chooses another one, and warns
            layer.delete_adapter(adapter_name)
            if not layer.lora_A:
                setattr(parent, name, layer.base_layer)

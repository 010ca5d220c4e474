"""Routers as a PEFT adapter on a model: `get_peft_model(model, RouterTuningConfig(...))`.

A `RouterLayer` (one router for each adapter) sits beside each routed unit, as a child of the
decoder layer; the engine (attach.py) calls it. It wraps nothing, so the base model's weights keep
their names; where the adapter has LoRA (lora.py), PEFT's LoRA layers wrap what they are put on.
`unload()` gives back the very same model. What does not fit the model (another base, no unit to
route, other weights than the adapter's) is refused, and leaves it as it was.

Importing this module registers the adapter type with PEFT. It is the only file that imports from
inside PEFT. Knows modules, and weights once they are read; opens no file: reading a config is in
peft_config.py, saving and loading a folder in adapter_folder.py.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    register_peft_method,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from router_tuning.attach import install, routing_of, uninstall
from router_tuning.embedded import name_of
from router_tuning.errors import AdapterError, ConfigError, RouterTuningError
from router_tuning.execution.context import Routing
from router_tuning.identity import check_identity, identify
from router_tuning.lora import (
    LORA_WEIGHTS,
    RoutedLora,
    activate_lora,
    drop_lora,
    lora_config,
    put_lora,
)
from router_tuning.peft_config import (
    METHOD,
    SAFETENSORS_WEIGHTS_NAME,
    RouterTuningConfig,
    peft_type,
)
from router_tuning.routers import make_router
from router_tuning.units import (
    KINDS,
    Unit,
    decoder_layers,
    decoder_of,
    find_units,
    hidden_size_of,
    part_of,
    router_child,
)

ROUTERS = "keep_logits"
"""Attribute of a RouterLayer that holds its routers, by adapter name."""
PREFIX = "keep_"
"""PEFT's mark of our weights' names. transformers' own loader writes the adapter's name behind the
first part of a key that contains it. That must be ROUTERS, so router_child must not contain it."""


class RouterLayer(nn.Module, BaseTunerLayer):
    """The routers beside one unit, one an adapter: (B, T, D) -> logits (B, T)."""

    adapter_layer_names = (ROUTERS,)

    def __init__(self) -> None:
        super().__init__()
        self.keep_logits = nn.ModuleDict()
        self._routing: Routing | None = None
        self._device: torch.device | None = None

    def add_router(self, adapter_name: str, router: nn.Module, device: torch.device) -> None:
        """Put in the router of an adapter."""
        self._device = device
        if not any(p.is_meta for p in router.parameters()):  # else: moved once it is loaded
            router.to(device)
        self.keep_logits[adapter_name] = router

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits of the active adapter's router, in fp32."""
        active = self.active_adapter  # of which there is one, see set_adapter
        name = active if isinstance(active, str) else active[0]
        logits_BT: Tensor = self.keep_logits[name](x_BTD)
        return logits_BT

    def enable_adapters(self, enabled: bool) -> None:
        """Switch routing on or off, for the whole model.

        PEFT's own switch leaves the active adapter trainable, also one that was loaded frozen; here
        what can be trained stays as it was.
        """
        self._disable_adapters = not enabled
        if self._routing is not None:
            self._routing.enabled = enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: a LoRA on the same model calls this when it merges itself."""

    def unmerge(self) -> None:
        """Do nothing, see merge."""

    @property
    def weight(self) -> Tensor:
        """No such thing: PEFT's layers give that of the module they wrap."""
        raise AttributeError("a RouterLayer wraps no module and has no weight")

    @property
    def bias(self) -> Tensor:
        """No such thing, see weight."""
        raise AttributeError("a RouterLayer wraps no module and has no bias")

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name in self.keep_logits:
            self.keep_logits[adapter_name].to(device or self._device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterLayer:
        # model.half() and model.to(bfloat16) move routers, but leave them in fp32 and unrounded.
        def in_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == torch.float32:
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        super()._apply(in_fp32, recurse)  # type: ignore[no-untyped-call]
        return self


class RouterTuningModel(BaseTuner):
    """Puts RouterLayers into a model, and keeps the engine at the active adapter's settings."""

    prefix = PREFIX
    tuner_layer_cls = RouterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name and type

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _check_name(model, adapter_name)
        if isinstance(peft_config, RouterTuningConfig):
            _check_no_lora(peft_config)
        before = _Before.of(model)
        # Said for every LoRA that is there too, which is what we support.
        try:
            with silent("Already found a `peft_config` attribute"):
                super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except RouterTuningError:
            before.restore(model)
            raise
        self._before = before

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter. All is checked first, so that an error leaves the model as it was."""
        config = _own(self.peft_config[adapter_name])
        try:
            self._units = _checked_units(model, config)
            targets = _lora_targets(model, config)
            _check_base(model, config)
            if config.lora is not None:
                with silent("fan_in_fan_out is set to False"):  # of Conv1D, where PEFT mends it
                    put_lora(model, adapter_name, config.lora, targets, low_cpu_mem_usage)
        except RouterTuningError:
            # Adapters of one model share the dict of configs, and PEFT has put this one in already.
            del self.peft_config[adapter_name]
            raise
        config._is_attached = True
        try:
            # Where routers go stands in the config; PEFT would read it off the names of weights.
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, None
            )
        except RouterTuningError:  # of a trial of the paths, which comes last
            _drop_routers(model, adapter_name)
            drop_lora(model, adapter_name)
            del self.peft_config[adapter_name]
            raise

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: PeftConfig, key: str
    ) -> bool:
        return key in self._units

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind = self._units[current_key].kind
        decoder_layer = target if kind == "block" else parent  # a block is the layer itself
        layer = getattr(decoder_layer, router_child(kind), None)
        if layer is None:
            layer = RouterLayer()
            layer.train(decoder_layer.training)
            decoder_layer.add_module(router_child(kind), layer)
        router = make_router(_own(peft_config), hidden_size_of(self.model))
        layer.add_router(adapter_name, router, next(decoder_layer.parameters()).device)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one: its routers, its LoRA, and its settings."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ConfigError(f"one adapter can route at a time, got {', '.join(names)}")
        config = _own(self.peft_config[names[0]]) if names else None
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        activate_lora(self.model, names, inference_mode)
        _follow(self.model, names[0] if names else "", config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. In the place of an active one, the first other one becomes active."""
        if not isinstance(self.peft_config.get(adapter_name), RouterTuningConfig):
            raise ValueError(f"Adapter {adapter_name} does not exist")
        _drop_routers(self.model, adapter_name)
        drop_lora(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            left = self._own_adapters()[:1]
            frozen = any(self.peft_config[name].inference_mode for name in left)
            self.set_adapter(left, inference_mode=frozen)

    def _own_adapters(self) -> list[str]:
        return [n for n, c in self.peft_config.items() if isinstance(c, RouterTuningConfig)]

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "routers cannot be merged into the base weights: they decide anew for each token or "
            "sequence. Use unload() for the base model without them, and set_budget(model, budget) "
            "or model(..., budget=...) to choose how much is skipped."
        )

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for name in self._own_adapters():
            _drop_routers(self.model, name)
            drop_lora(self.model, name)
            del self.peft_config[name]
        self.set_adapter([])
        if not self.peft_config:  # else a LoRA lives on the same model
            self.model.__dict__.pop("peft_config", None)
            self._before.restore(self.model)
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the adapter's name right before the parameter's; ours stands higher.
        if f".{ROUTERS}.{adapter_name}." in key:
            return key.replace(f".{ROUTERS}.{adapter_name}.", f".{ROUTERS}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """PEFT's hook just before weights are copied: here every way of loading them passes."""
        config = _own(config)
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            _check_weights(model, adapter_name, loaded, config._loading_from)
        except AdapterError:
            if config._loading_from is not None and isinstance(model, PeftModel):
                _undo_loading(model, adapter_name)
            raise
        config._loading_from = None
        return loaded


def _own(config: PeftConfig) -> RouterTuningConfig:
    if not isinstance(config, RouterTuningConfig):
        raise ConfigError(f"wanted a router-tuning adapter, got one of type {config.peft_type}")
    return config


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """Adapters of one model share a dict: one of the same name would be lost without a word."""
    other = getattr(model, "peft_config", {}).get(adapter_name)
    if other is not None:
        raise ConfigError(
            f"the model has an adapter named {adapter_name!r} already, of type "
            f"{other.peft_type.value}; take that off with unload(), or give another name: "
            f'get_peft_model(model, config, adapter_name="routers")'
        )


def _check_no_lora(config: RouterTuningConfig) -> None:
    """Refuse LoRA where no PeftModel is made: transformers' own loader would give its weights the
    wrong names, and leave them at random with no more than a line in the log.
    """
    if config.lora is None:
        return
    folder = repr(config._loading_from or "folder")
    raise AdapterError(
        f"an adapter with LoRA in it needs a PEFT model, which transformers' own loader and "
        f"inject_adapter_in_model do not make; use router_tuning.load_adapter({folder}, model) or "
        f"PeftModel.from_pretrained(model, {folder}); for a new one, get_peft_model(model, config)"
    )


def _checked_units(model: nn.Module, config: RouterTuningConfig) -> dict[str, Unit]:
    """The units to route, by the name of their module; patterns of names become `layers`."""
    config.check()
    decoder = decoder_of(model)
    layers = decoder_layers(decoder)
    beside = [getattr(x, router_child(kind), None) for x in layers for kind in KINDS]
    if any(not isinstance(child, RouterLayer | None) for child in beside):
        raise ConfigError("this model was routed by attach(); detach(model) first")
    name_by_id = {id(module): name for name, module in model.named_modules()}
    units = {
        name_by_id[id(part_of(decoder, layers[unit.layer_idx], unit.kind))]: unit
        for unit in find_units(model, config)
    }
    if config.target_modules is None and config.exclude_modules is None:
        return units
    chosen = {
        name: unit
        for name, unit in units.items()
        if (config.target_modules is None or _matches(name, config.target_modules))
        and not _matches(name, config.exclude_modules or [])
    }
    if not chosen:
        raise ConfigError(
            f"target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r} leaves no unit to route; the units are "
            f"{', '.join(list(units)[:2])} and so on. Leave both at None and use `layers`."
        )
    config.layers = sorted({unit.layer_idx for unit in chosen.values()})
    beside = [
        name for name, u in units.items() if u.layer_idx in config.layers and name not in chosen
    ]
    if beside:
        raise ConfigError(
            f"target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r} routes some units of a layer and leaves "
            f"out others ({beside[0]}); name the kinds in granularity and the layers in `layers`"
        )
    config.target_modules = config.exclude_modules = None
    return chosen


def _lora_targets(model: nn.Module, config: RouterTuningConfig) -> list[str]:
    """The full names of the modules that the adapter's LoRA goes to; none without LoRA. Where it
    was left to PEFT, the config then says which.
    """
    lora = config.lora
    if lora is None:
        return []
    if config._targets_are_usual:
        lora["target_modules"] = _usual_targets(decoder_of(model))
    wanted = lora["target_modules"]
    linear = dict(_linear_layers(model))
    inside = _inside_layers(model, linear)
    everything = wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND
    asked = lora_config(lora, sorted(inside) if everything else wanted)
    found = [name for name in linear if check_target_module_exists(asked, name)]
    outside = [name for name in found if name not in inside]
    endings = sorted({name.rpartition(".")[2] for name in inside})
    if outside:
        raise ConfigError(
            f"lora target_modules={wanted!r} reaches {outside[0]}, but LoRA beside routers goes to "
            f"linear layers inside the decoder layers only; there are {', '.join(endings)}"
        )
    each = [] if isinstance(wanted, str) else wanted
    idle = [one for one in each if not any(_matches(name, [one]) for name in inside)]
    if idle or not found:
        raise ConfigError(
            f"lora target_modules={wanted!r}: {repr(idle[0]) if idle else 'it'} names no linear "
            f"layer of the decoder layers that LoRA could go to; there are {', '.join(endings)}"
        )
    taken = [name for name in found if _is_of_others(linear[name])]
    if taken:
        raise ConfigError(
            f"{taken[0]} has the LoRA of another adapter already; leave `lora` out to train "
            f"routers over it, merge it first (merge_and_unload), or name other target_modules"
        )
    return found


def _usual_targets(decoder: nn.Module) -> list[str] | str:
    """PEFT's choice for a family."""
    kind = str(decoder.config.model_type)  # type: ignore[union-attr]
    usual: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if usual is None:
        raise ConfigError(
            f"PEFT knows no usual LoRA targets for model_type {kind!r}; name them: "
            f"lora={{'target_modules': [...]}}"
        )
    return usual if isinstance(usual, str) else sorted(usual)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What LoRA can go to, or is on: linear layers of any make, but none inside an adapter."""
    within: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in within):
            continue
        if isinstance(module, BaseTunerLayer):
            within.append(f"{name}.")
        sized = hasattr(module, "in_features") and hasattr(module, "out_features")
        if sized or isinstance(module, Conv1D):
            yield name, module


def _inside_layers(model: nn.Module, linear: dict[str, nn.Module]) -> set[str]:
    within = {id(m) for layer in decoder_layers(decoder_of(model)) for m in layer.modules()}
    return {name for name, module in linear.items() if id(module) in within}


def _is_of_others(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, RoutedLora)


def _matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module's name is meant, by PEFT's rules: one pattern for all of it, or endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def _check_base(model: nn.Module, config: RouterTuningConfig) -> None:
    """Compare the model with the one the adapter was made on; for a new adapter, record it."""
    if config._base_is_given and config.base is not None:
        check_identity(model, config.base, allow_changed_weights=config._allow_changed_weights)
        return
    name = config.base_model_name or getattr(model, "name_or_path", None)
    config.base = identify(model, name_of(name) if name else None)


def _router_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, RouterLayer]]:
    """The decoder layers that have routers, each with the names of its RouterLayers, and these."""
    for layer in decoder_layers(decoder_of(model)):
        for name in map(router_child, KINDS):
            child = getattr(layer, name, None)
            if isinstance(child, RouterLayer):
                yield layer, name, child


def _follow(model: nn.Module, adapter_name: str, config: RouterTuningConfig | None) -> None:
    """Set the engine to the active adapter's settings; None takes it off."""
    before: Routing | None = decoder_of(model).__dict__.get("routing")
    if config is None:
        uninstall(model)
        return
    if before is not None and before.units == tuple(find_units(model, config)):
        before.config = config
    else:
        uninstall(model)
        install(model, config)
        routing_of(model).enabled = before is None or before.enabled
    routing_of(model).adapter = adapter_name
    for _, _, child in _router_layers(model):
        child._routing = routing_of(model)


def _drop_routers(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's routers; a layer that is left without any is as before."""
    for layer, name, child in list(_router_layers(model)):
        if adapter_name in child.keep_logits:
            del child.keep_logits[adapter_name]
        if not child.keep_logits:
            delattr(layer, name)


# PEFT hooks the embeddings of a model that checkpoints activations; transformers keeps them here.
_INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")


@dataclass(frozen=True)
class _Before:
    """What PEFT changes on a base model beside adding adapters, as it was."""

    trainable: dict[str, bool]
    hooks: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Before:
        """Note it down."""
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        return cls(trainable, {n: model.__dict__[n] for n in _INPUT_HOOKS if n in model.__dict__})

    def restore(self, model: nn.Module) -> None:
        """Put it back."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable.get(name, parameter.requires_grad))
        hooks, hook = _INPUT_HOOKS
        for handle in model.__dict__.pop(hooks, []):
            if handle not in self.hooks.get(hooks, []):
                handle.remove()
        model.__dict__.pop(hook, None)
        model.__dict__.update(self.hooks)


def _check_weights(
    model: nn.Module, adapter_name: str, loaded: dict[str, Tensor], place: str | None
) -> None:
    """The weights must be exactly those of the adapter: of its routers, and of its LoRA."""
    where = "the adapter" if place is None else os.path.join(place, SAFETENSORS_WEIGHTS_NAME)
    what_to_do = "The config and the weights are not of one adapter; save or copy both again."
    there = model.state_dict()
    parts = tuple(f".{part}.{adapter_name}." for part in (ROUTERS, *LORA_WEIGHTS))
    wanted = [key for key in there if any(part in key for part in parts)]
    missing = [key for key in wanted if key not in loaded]
    if missing:
        raise AdapterError(
            f"{where} lacks {len(missing)} of the {len(wanted)} weights that its config "
            f"asks for; the first is {missing[0]}. {what_to_do}"
        )
    unknown = [key for key in loaded if key not in there]
    if unknown:
        raise AdapterError(
            f"{where} has {len(unknown)} weights that no router and no LoRA of its config has; "
            f"the first is {unknown[0]}. {what_to_do}"
        )
    for key in wanted:
        if loaded[key].shape != there[key].shape:
            raise AdapterError(
                f"{where}: {key} has shape {tuple(loaded[key].shape)}, wanted "
                f"{tuple(there[key].shape)}. {what_to_do}"
            )


def _undo_loading(model: PeftModel, adapter_name: str) -> None:
    """Take off an adapter whose weights turned out not to fit."""
    tuner = cast(RouterTuningModel, model.base_model)
    if set(model.peft_config) == {adapter_name}:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)


@contextmanager
def silent(message: str) -> Iterator[None]:
    """Without a warning of PEFT's that is meant for something else than what we do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=METHOD, config_cls=RouterTuningConfig, model_cls=RouterTuningModel, prefix=PREFIX
    )

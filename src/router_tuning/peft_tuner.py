"""Routers as a PEFT adapter: `get_peft_model(model, RouterTuningConfig(...))`, saving and loading.

The only file that imports PEFT's internals. A `RouterLayer` (one router an adapter) sits beside each routed
attention, as a child of the decoder layer; the engine (attach.py) calls it. Nothing is wrapped, so the base
model's weights keep their names, and `unload()` gives back the very same model.

Importing this module registers the adapter type with PEFT.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, register_peft_method
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from router_tuning.attach import ROUTER_CHILD, install, routing_of, uninstall
from router_tuning.card import FILE_NAME as CARD_NAME
from router_tuning.card import write_card
from router_tuning.config import RoutingConfig
from router_tuning.errors import AdapterError, ConfigError, RouterTuningError
from router_tuning.execution.context import Routing
from router_tuning.identity import check_identity, identify
from router_tuning.routers import make_router
from router_tuning.units import (
    Unit,
    attention_of,
    decoder_layers,
    decoder_of,
    find_units,
    hidden_size_of,
)

METHOD = "router_tuning"
ROUTERS = "keep_logits"
"""Attribute of a RouterLayer that holds its routers, by adapter name."""
PREFIX = "keep_"
"""PEFT's name prefix for our weights. transformers' own loader puts the adapter's name behind the first part
of a key that has it, so ROUTERS must be the only one: ROUTER_CHILD must not contain it."""


def _peft_type() -> PeftType:
    """Our member of PEFT's list of adapter types, added on first use.

    PEFT has no entry point for adapter types from outside: `register_peft_method` takes only names that
    stand in the enum, and an enum takes no members once it is made. So the member is put in by hand.
    """
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


@dataclass(kw_only=True)
class RouterTuningConfig(RoutingConfig, PeftConfig):  # type: ignore[misc]
    """What is routed (RoutingConfig), as a PEFT config. Layers are named by `layers`."""

    task_type: str | None = "CAUSAL_LM"  # type: ignore[assignment]
    """PEFT's task type. None for a bare decoder."""

    target_modules: list[str] | str | None = None
    """Module names of units (or their endings, or one pattern), to route only those. None: all of `layers`."""

    exclude_modules: list[str] | str | None = None
    """Module names of units (or their endings, or one pattern) that are not routed."""

    modules_to_save: list[str] | None = None
    """Must stay None: only routers train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        self.check()
        if self.modules_to_save:
            raise ConfigError(
                f"modules_to_save must be None: only routers train, and the base model stays as it is; "
                f"got {self.modules_to_save!r}"
            )
        # Known from a file, not from attaching: then it is compared, not written.
        self._base_is_given = self.base is not None
        self._loading_from: str | None = None
        self._allow_changed_weights = False

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json (under a temporary name first) and the model card."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)
            os.replace(Path(temporary, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
        write_card(save_directory, self)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RouterTuningConfig:
        """Read the config of an adapter folder or hub repository; a weights file beside it is looked at too.

        Raises:
            AdapterError: not found, half-written, or of a newer format.
        """
        place = os.path.join(str(pretrained_model_name_or_path), subfolder or "").rstrip(os.sep)
        try:
            config = super().from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        except RouterTuningError as error:
            raise AdapterError(f"{place}: {error}") from error
        except ValueError as error:
            raise AdapterError(f"no {CONFIG_NAME} at {place}: {error}") from error
        if not isinstance(config, RouterTuningConfig):
            raise AdapterError(
                f"{place} holds a {config.peft_type} adapter, not a router-tuning one"
            )
        if os.path.isfile(os.path.join(place, SAFETENSORS_WEIGHTS_NAME)):
            read_weights_header(place)
        config._loading_from = place
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields in a config file.

        Raises:
            AdapterError: the file is not one JSON object.
        """
        try:
            fields = super().from_json_file(path_json_file, **kwargs)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
            raise AdapterError(_not_a_config(path_json_file, error)) from error
        if not isinstance(fields, dict):
            raise AdapterError(_not_a_config(path_json_file, f"it holds a {type(fields).__name__}"))
        return fields


class RouterLayer(nn.Module, BaseTunerLayer):
    """The routers beside one attention, by adapter name: (B, T, D) -> logits (B, T) of the active one."""

    adapter_layer_names = (ROUTERS,)

    def __init__(self) -> None:
        super().__init__()
        self.keep_logits = nn.ModuleDict()
        self._routing: Routing | None = None
        self._device: torch.device | None = None

    def add_router(self, adapter_name: str, router: nn.Module, device: torch.device) -> None:
        """Put in the router of an adapter, in the place of one that it had."""
        self._device = device
        if not any(
            p.is_meta for p in router.parameters()
        ):  # low_cpu_mem_usage: moved once it is loaded
            router.to(device)
        self.keep_logits[adapter_name] = router

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits of the active adapter's router."""
        (active,) = self.active_adapters
        return self.keep_logits[active](x_BTD)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch routing on or off, for the whole model.

        PEFT's own switch makes the active adapter trainable when it is switched on again; here what could
        be trained before can be trained after, and nothing else.
        """
        self._disable_adapters = not enabled
        if self._routing is not None:
            self._routing.enabled = enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: a LoRA on the same model calls this when it merges itself."""

    def unmerge(self) -> None:
        """Nothing, see merge."""

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
        # model.half() and model.to(bfloat16) move routers but leave them in fp32, and do not round them.
        def in_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == torch.float32:
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        super()._apply(in_fp32, recurse)
        return self


class RouterTuningModel(BaseTuner):
    """Puts RouterLayers into a model and keeps the engine at the active adapter's settings."""

    prefix = PREFIX
    tuner_layer_cls = RouterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's name and type)

    def __init__(
        self,
        model: nn.Module,
        peft_config: RouterTuningConfig | dict[str, RouterTuningConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _check_name(model, adapter_name)
        before = _Before.of(model)
        with _silent("Already found a `peft_config` attribute"):
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        self._before = before

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter. What can be wrong is looked at first, so that an error leaves the model as it was."""
        config = self.peft_config[adapter_name]
        try:
            self._units = _checked_units(model, config)
            _check_base(model, config)
        except RouterTuningError:
            # A model that has other adapters shares the dict of configs, which holds this one already.
            if len(self.peft_config) > 1:
                del self.peft_config[adapter_name]
            raise
        # Where routers go is known from the config; PEFT would look for names in the state dict.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, None)

    def _prepare_adapter_config(
        self, peft_config: RouterTuningConfig, model_config: dict[str, Any]
    ) -> RouterTuningConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: RouterTuningConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._units

    def _create_and_replace(
        self,
        peft_config: RouterTuningConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(parent, ROUTER_CHILD, None)
        if layer is None:
            layer = RouterLayer()
            parent.add_module(ROUTER_CHILD, layer)
        router = make_router(peft_config, hidden_size_of(self.model))
        layer.add_router(adapter_name, router, next(parent.parameters()).device)
        layer.train(parent.training)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one: its routers, and its settings."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ConfigError(
                f"one routing adapter can be active at a time, got {', '.join(names)}"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        _follow(self.model, self.peft_config[names[0]] if names else None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. The first of those that are left becomes active; without one the model is dense."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        was_active = adapter_name in self.active_adapters
        _drop_routers(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if not was_active:
            return
        left = [n for n, c in self.peft_config.items() if isinstance(c, RouterTuningConfig)]
        self.set_adapter(
            left[:1], inference_mode=bool(left) and self.peft_config[left[0]].inference_mode
        )

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "routers cannot be merged into the base weights: they decide anew for every token or sequence. "
            "Use unload() for the base model without routers, and set_budget(model, budget) or "
            "model(..., budget=...) to choose how much is skipped."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for name in [n for n, c in self.peft_config.items() if isinstance(c, RouterTuningConfig)]:
            _drop_routers(self.model, name)
            del self.peft_config[name]
        _follow(self.model, None)
        self.active_adapter = []
        if not self.peft_config:  # else a LoRA lives on the same model
            self.model.__dict__.pop("peft_config", None)
            self._before.restore(self.model)
        return cast(nn.Module, self.model)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RouterTuningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {k: v for k, v in state_dict.items() if f".{ROUTERS}.{adapter_name}." in k}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the adapter's name right before the parameter's; ours may be deeper.
        return key.replace(f".{ROUTERS}.{adapter_name}.", f".{ROUTERS}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: RouterTuningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Here every way of loading passes, just before the weights are copied."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        try:
            _check_weights(model, adapter_name, remapped, config._loading_from)
        except AdapterError:
            if config._loading_from is not None and isinstance(model, PeftModel):
                _undo_loading(model, adapter_name)
            raise
        config._loading_from = None
        return remapped


def load_adapter(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | str | None = None,
    is_trainable: bool = False,
    allow_changed_weights: bool = False,
) -> PeftModel:
    """Load an adapter, with its base model unless one is given. Everything is checked before weights are copied.

    Args:
        folder: an adapter folder, or a hub repository.
        model: the base model, or a PEFT model of it. None loads the one that the adapter names.
        adapter_name: the name under which the adapter is added; it becomes the active one.
        dtype: of the base model, where it is loaded here. None takes that of its files.
        is_trainable: whether the routers shall be trained on.
        allow_changed_weights: accept a base model of the same shape whose weights differ.

    Raises:
        AdapterError: the folder is missing, damaged, of a newer format, or does not fit its own config.
        BaseModelMismatchError: the model is not the one that the adapter was made for.
    """
    place = _local_folder(folder)
    config = RouterTuningConfig.from_pretrained(place)
    if not os.path.isfile(os.path.join(place, SAFETENSORS_WEIGHTS_NAME)):
        raise AdapterError(
            f"{place} has no {SAFETENSORS_WEIGHTS_NAME}; save or copy the adapter again"
        )
    config.inference_mode = not is_trainable
    config._allow_changed_weights = allow_changed_weights
    if model is None:
        model = _load_base(config, place, dtype)
    elif dtype is not None:
        raise ConfigError(
            "dtype says how to load the base model; a model was given, so convert that one"
        )
    device = str(next(model.parameters()).device)
    if isinstance(model, PeftModel) and model.peft_type == _peft_type():
        model.add_adapter(adapter_name, config)
        model.load_adapter(place, adapter_name, is_trainable=is_trainable, torch_device=device)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return PeftModel.from_pretrained(
        base, place, adapter_name, is_trainable, config=config, torch_device=device
    )


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> Path:
    """Save one adapter (the active one by default) so that an interrupted save leaves the old files whole.

    Every file is written under a temporary name inside the folder and then renamed.

    Raises:
        AdapterError: the folder cannot be written, or the disk is full.
    """
    name = adapter_name or model.active_adapter
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            written = Path(temporary) if name == "default" else Path(temporary, name)
            card = folder / CARD_NAME
            if card.exists():
                written.mkdir(exist_ok=True)
                shutil.copy(card, written)  # what people wrote into it is kept
            model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
            for file in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, CARD_NAME):
                os.replace(written / file, folder / file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(
            f"cannot write the adapter to {folder}: {reason}. An adapter that was there is unchanged. "
            f"Free some space or choose another folder."
        ) from error
    return folder


def read_weights_header(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in an adapter's weights file, which is opened but not loaded.

    Raises:
        AdapterError: the file is missing, cut short or damaged.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}): it is missing, cut short or damaged; save or copy it again"
        ) from error


@dataclass(frozen=True)
class _Before:
    """What PEFT changes on a base model beside adding adapters, as it was."""

    trainable: dict[str, bool]
    attributes: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Before:
        return cls(
            {name: p.requires_grad for name, p in model.named_parameters()},
            frozenset(model.__dict__),
        )

    def restore(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable.get(name, parameter.requires_grad))
        # PEFT hooks the embeddings of a model that has gradient checkpointing on.
        hooks = {"_require_grads_hooks", "_require_grads_hook"} - self.attributes
        if hooks & model.__dict__.keys():
            model.disable_input_require_grads()  # type: ignore[operator]
        for name in hooks:
            model.__dict__.pop(name, None)


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """Adapters of one model share a dict: a LoRA under the same name would be lost."""
    other = getattr(model, "peft_config", {}).get(adapter_name)
    if other is not None and not isinstance(other, RouterTuningConfig):
        raise ConfigError(
            f"the model has a {other.peft_type.value} adapter named {adapter_name!r} already; give the routers "
            f'another name: get_peft_model(model, config, adapter_name="routers")'
        )


def _checked_units(model: nn.Module, config: RouterTuningConfig) -> dict[str, Unit]:
    """The units to route, by the name of their module; target and exclude patterns become `layers`."""
    config.check()
    decoder = decoder_of(model)
    layers = decoder_layers(decoder)
    if any(not isinstance(getattr(x, ROUTER_CHILD, RouterLayer()), RouterLayer) for x in layers):
        raise ConfigError(
            "this model was routed by attach(); detach(model) before it becomes a PEFT model"
        )
    name_of = {id(module): name for name, module in model.named_modules()}
    units = {
        name_of[id(attention_of(decoder, layers[unit.layer_idx]))]: unit
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
            f"target_modules={config.target_modules!r} and exclude_modules={config.exclude_modules!r} leave no "
            f"unit to route; units here are {', '.join(list(units)[:2])}, ...: use `layers` to choose among them"
        )
    config.layers = sorted({unit.layer_idx for unit in chosen.values()})
    config.target_modules = config.exclude_modules = None
    return chosen


def _matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module's name is meant, by PEFT's rules: one pattern for all of it, or a list of endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def _check_base(model: nn.Module, config: RouterTuningConfig) -> None:
    """Compare the model with the one that the adapter was made for; record it for a new adapter."""
    if config._base_is_given and config.base is not None:
        check_identity(model, config.base, allow_changed_weights=config._allow_changed_weights)
        return
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    config.base = identify(model, name or None)


def _router_layers(model: nn.Module) -> Iterator[tuple[nn.Module, RouterLayer]]:
    """The decoder layers that have routers, each with its RouterLayer."""
    for layer in decoder_layers(decoder_of(model)):
        child = getattr(layer, ROUTER_CHILD, None)
        if isinstance(child, RouterLayer):
            yield layer, child


def _follow(model: nn.Module, config: RouterTuningConfig | None) -> None:
    """Set the engine to the active adapter's settings; None takes it off."""
    before = decoder_of(model).__dict__.get("routing")
    uninstall(model)
    if config is None:
        return
    install(model, config)
    routing = routing_of(model)
    routing.enabled = before is None or before.enabled
    for _, child in _router_layers(model):
        child._routing = routing


def _drop_routers(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's routers; a layer without any is as before."""
    for layer, child in list(_router_layers(model)):
        if adapter_name in child.keep_logits:
            del child.keep_logits[adapter_name]
        if not child.keep_logits:
            delattr(layer, ROUTER_CHILD)


def _check_weights(
    model: nn.Module, adapter_name: str, loaded: dict[str, Tensor], place: str | None
) -> None:
    """The weights of an adapter must be exactly those of its routers."""
    where = (
        "the adapter's weights" if place is None else os.path.join(place, SAFETENSORS_WEIGHTS_NAME)
    )
    there = model.state_dict()
    wanted = [k for k in there if f".{ROUTERS}.{adapter_name}." in k]
    missing = [k for k in wanted if k not in loaded]
    if missing:
        raise AdapterError(
            f"{where}: {len(missing)} of {len(wanted)} router weights are missing, the first is {missing[0]}. "
            f"The config routes more layers than were saved; save or copy the adapter again."
        )
    unknown = [k for k in loaded if k not in there]
    if unknown:
        raise AdapterError(
            f"{where}: {len(unknown)} weights belong to no router of this config, the first is {unknown[0]}. "
            f"The config and the weights are not of one adapter; save or copy both again."
        )
    for key in wanted:
        if loaded[key].shape != there[key].shape:
            raise AdapterError(
                f"{where}: {key} has shape {tuple(loaded[key].shape)}, wanted {tuple(there[key].shape)}. "
                f"The config and the weights are not of one adapter; save or copy both again."
            )


def _undo_loading(model: PeftModel, adapter_name: str) -> None:
    """Take off an adapter whose weights turned out not to fit."""
    if set(model.peft_config) == {adapter_name}:
        model.base_model.unload()
    else:
        model.base_model.delete_adapter(adapter_name)


def _local_folder(folder: str | Path) -> str:
    """The adapter's folder on this machine; a hub repository is fetched first."""
    if os.path.isdir(folder):
        return str(folder)
    try:
        return snapshot_download(
            str(folder), allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME]
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise AdapterError(
            f"no adapter folder {folder}, and no such hub repository ({error})"
        ) from error


def _load_base(
    config: RouterTuningConfig, place: str, dtype: torch.dtype | str | None
) -> nn.Module:
    name = config.base_model_name_or_path
    if not name:
        raise AdapterError(
            f"{place} names no base model; load that yourself and pass it: load_adapter(folder, model)"
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        name, revision=config.revision, dtype=dtype or "auto"
    )
    return model


def _not_a_config(path: str, reason: object) -> str:
    return (
        f"{path} is no adapter config ({reason}); the file was cut short or changed by hand: "
        f"save or copy it again"
    )


@contextmanager
def _silent(message: str) -> Iterator[None]:
    """Do without a warning of PEFT's that is meant for something else than what we do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


def _register() -> None:
    if _peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=METHOD, config_cls=RouterTuningConfig, model_cls=RouterTuningModel, prefix=PREFIX
        )


_register()

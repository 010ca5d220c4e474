"""Routers as a PEFT adapter: `get_peft_model(model, RouterTuningConfig(...))`, saving and loading.

The only file that imports PEFT's internals. A `RouterLayer` (one router for each adapter) sits
beside each routed attention, as a child of the decoder layer; the engine (attach.py) calls it.
Nothing is wrapped, so the base model's weights keep their names and `unload()` gives back the very
same model.

Importing this module registers the adapter type with PEFT.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, register_peft_method
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from router_tuning.attach import ROUTER_CHILD, install, routing_of, uninstall
from router_tuning.card import FILE_NAME as CARD_NAME
from router_tuning.card import write_card
from router_tuning.config import RoutingConfig
from router_tuning.embedded import ALIASES, load_model, models_folder, name_of, resolve
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
"""PEFT's mark of our weights' names. transformers' own loader writes the adapter's name behind the
first part of a key that contains it. That must be ROUTERS, so ROUTER_CHILD must not contain it."""


def _peft_type() -> PeftType:
    """Our member of PEFT's list of adapter types, added on first use.

    PEFT has no entry point for adapter types from outside: `register_peft_method` takes only names
    that stand in the enum, and an enum takes no members once it is made. So it is put in by hand.
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


class _BaseName:
    """The base model's name in a config: an alias is saved as it is, and read as its local folder.

    PEFT and transformers load, or look up, what they read here, and know no aliases. For a config
    that is on no model yet (AutoPeftModelForCausalLM reads it to load the base) the alias's model
    is fetched if need be.
    """

    def __get__(self, config: RouterTuningConfig | None, owner: type | None = None) -> str | None:
        name = None if config is None else config.base_model_name
        if config is None or name is None or name not in ALIASES:
            return name
        folder = models_folder() / name
        if not config._is_attached:
            return resolve(name)
        return str(folder) if folder.is_dir() else name

    def __set__(self, config: RouterTuningConfig, name: str | None) -> None:
        config.__dict__["base_model_name_or_path"] = None if name is None else name_of(str(name))


# A generated __repr__ or __eq__ would read every field, and so fetch models: RoutingConfig's do.
@dataclass(kw_only=True, repr=False, eq=False)
class RouterTuningConfig(RoutingConfig, PeftConfig):
    """What is routed (RoutingConfig), as a PEFT config. Layers are chosen by `layers`."""

    base_model_name_or_path: str | None = _BaseName()  # type: ignore[assignment]
    """Hub id, folder or alias of the base model. `base_model_name` is the name as it is saved."""

    task_type: str | None = "CAUSAL_LM"
    """PEFT's task type. None for a bare decoder."""

    target_modules: list[str] | str | None = None
    """Names of modules to route (endings, or one pattern for a whole name). None: all units."""

    exclude_modules: list[str] | str | None = None
    """Names of modules that are not routed, in the same form. Both become `layers` on attaching."""

    modules_to_save: list[str] | None = None
    """PEFT's list of base modules to train too. Must stay None: only routers train."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = _peft_type()
        self.check()
        if self.modules_to_save:
            raise ConfigError(
                f"modules_to_save must be None, since only routers train and the base model stays "
                f"as it is; got {self.modules_to_save!r}"
            )
        # A base known from a file is compared with the model; one known from attaching is replaced.
        self._base_is_given = self.base is not None
        self._loading_from: str | None = None
        self._allow_changed_weights = False
        self._is_attached = False

    @property
    def base_model_name(self) -> str | None:
        """The base model's name as it is saved: hub id, folder or alias."""
        name: str | None = self.__dict__.get("base_model_name_or_path")
        return name

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved."""
        return {f.name: copy.deepcopy(self.__dict__[f.name]) for f in fields(self)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json (beside its place, then renamed) and the model card."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)
            os.replace(Path(temporary, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
        write_card(save_directory, self, self.base_model_name)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RouterTuningConfig:
        """Read the config of an adapter folder or hub repository.

        Raises:
            AdapterError: missing, half-written, of a newer format, or beside damaged weights.
        """
        name = pretrained_model_name_or_path
        place = os.path.join(str(name), subfolder or "").rstrip(os.sep)
        _check_folder(place if os.path.isdir(name) else name)
        try:
            config = (
                super().from_pretrained(place, **kwargs)
                if os.path.isdir(place)
                else super().from_pretrained(name, subfolder, **kwargs)
            )
        except (RouterTuningError, ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"no adapter can be read from {place}: {error}") from error
        if not isinstance(config, RouterTuningConfig):
            raise AdapterError(
                f"{place} holds a {config.peft_type} adapter, not a router-tuning one"
            )
        if os.path.isfile(os.path.join(place, SAFETENSORS_WEIGHTS_NAME)):
            check_weights_file(place)
        config._loading_from = place
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields in a config file.

        Raises:
            AdapterError: the file is not one JSON object.
            ConfigError: its format is newer than this version of the package.
        """
        try:
            found = super().from_json_file(path_json_file, **kwargs)
        except ValueError as error:  # of JSON or of the encoding
            raise AdapterError(_not_a_config(path_json_file, error)) from error
        if not isinstance(found, dict):
            raise AdapterError(_not_a_config(path_json_file, f"it holds a {type(found).__name__}"))
        # Before PEFT meets, and drops, fields that only the newer version knows.
        RoutingConfig(format_version=found.get("format_version", 1)).check()
        return found


class RouterLayer(nn.Module, BaseTunerLayer):
    """The routers beside one attention, one an adapter: (B, T, D) -> logits (B, T)."""

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
        (active,) = self.active_adapters
        logits_BT: Tensor = self.keep_logits[active](x_BTD)
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
        before = _Before.of(model)
        # Said for every LoRA that is there too, which is what we support.
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
        """Add an adapter. All is checked first, so that an error leaves the model as it was."""
        config = _own(self.peft_config[adapter_name])
        try:
            self._units = _checked_units(model, config)
            _check_base(model, config)
        except RouterTuningError:
            # Adapters of one model share the dict of configs, and PEFT has put this one in already.
            del self.peft_config[adapter_name]
            raise
        config._is_attached = True
        # Where routers go stands in the config; PEFT would read it off the names in the state dict.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, None)

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
        layer = getattr(parent, ROUTER_CHILD, None)
        if layer is None:
            layer = RouterLayer()
            layer.train(parent.training)
            parent.add_module(ROUTER_CHILD, layer)
        router = make_router(_own(peft_config), hidden_size_of(self.model))
        layer.add_router(adapter_name, router, next(parent.parameters()).device)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one: its routers, and its settings."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ConfigError(f"one adapter can route at a time, got {', '.join(names)}")
        config = _own(self.peft_config[names[0]]) if names else None
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        _follow(self.model, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. In the place of an active one, the first other one becomes active."""
        if not isinstance(self.peft_config.get(adapter_name), RouterTuningConfig):
            raise ValueError(f"Adapter {adapter_name} does not exist")
        _drop_routers(self.model, adapter_name)
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
            del self.peft_config[name]
        self.set_adapter([])
        if not self.peft_config:  # else a LoRA lives on the same model
            self.model.__dict__.pop("peft_config", None)
            self._before.restore(self.model)
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the adapter's name right before the parameter's; ours stands higher.
        return key.replace(f".{ROUTERS}.{adapter_name}.", f".{ROUTERS}.", 1)

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


def _checked_units(model: nn.Module, config: RouterTuningConfig) -> dict[str, Unit]:
    """The units to route, by the name of their module; patterns of names become `layers`."""
    config.check()
    decoder = decoder_of(model)
    layers = decoder_layers(decoder)
    if any(not isinstance(getattr(x, ROUTER_CHILD, None), RouterLayer | None) for x in layers):
        raise ConfigError("this model was routed by attach(); detach(model) first")
    name_by_id = {id(module): name for name, module in model.named_modules()}
    units = {
        name_by_id[id(attention_of(decoder, layers[unit.layer_idx]))]: unit
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
    config.target_modules = config.exclude_modules = None
    return chosen


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


def _router_layers(model: nn.Module) -> Iterator[tuple[nn.Module, RouterLayer]]:
    """The decoder layers that have routers, each with its RouterLayer."""
    for layer in decoder_layers(decoder_of(model)):
        child = getattr(layer, ROUTER_CHILD, None)
        if isinstance(child, RouterLayer):
            yield layer, child


def _follow(model: nn.Module, config: RouterTuningConfig | None) -> None:
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
    for _, child in _router_layers(model):
        child._routing = routing_of(model)


def _drop_routers(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's routers; a layer that is left without any is as before."""
    for layer, child in list(_router_layers(model)):
        if adapter_name in child.keep_logits:
            del child.keep_logits[adapter_name]
        if not child.keep_logits:
            delattr(layer, ROUTER_CHILD)


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


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> Path:
    """Save one adapter, by default the active one; an interrupted save leaves the old files whole.

    Every file is written in a temporary folder inside and then renamed, the config last.

    Raises:
        AdapterError: the folder cannot be written, or the disk is full.
    """
    name = str(adapter_name or model.active_adapter)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            written = Path(temporary) if name == "default" else Path(temporary, name)
            written.mkdir(exist_ok=True)
            if (folder / CARD_NAME).exists():
                shutil.copy(folder / CARD_NAME, written)  # what people wrote into it is kept
            model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
            for file in (SAFETENSORS_WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
                os.replace(written / file, folder / file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(
            f"cannot write the adapter to {folder}: {reason}. An adapter that was there is still "
            f"whole. Make room, make the folder writable, or choose another."
        ) from error
    return folder


def load_adapter(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | str | None = None,
    is_trainable: bool = False,
    allow_changed_weights: bool = False,
) -> PeftModel:
    """Load an adapter, and its base model unless that is given. All is checked before it is loaded.

    Args:
        folder: an adapter's folder, or a hub repository.
        model: the base model, or a PEFT model of it. None loads the one that the adapter names.
        adapter_name: the name under which the adapter is added; it becomes the active one.
        dtype: of a base model that is loaded here. None takes that of its files.
        is_trainable: whether the routers are to be trained on.
        allow_changed_weights: accept a base model of the same shape with other weights.

    Raises:
        AdapterError: missing, damaged, of a newer format, or weights that do not fit the config.
        BaseModelMismatchError: the model is not the one that the adapter was made on.
    """
    place = _local_folder(folder)
    config = RouterTuningConfig.from_pretrained(place)
    check_weights_file(place)
    config.inference_mode = not is_trainable
    config._allow_changed_weights = allow_changed_weights
    if model is None:
        model = _load_base(config, place, dtype)
    elif dtype is not None:
        raise ConfigError("dtype is for a base model that is loaded here; convert the one you pass")
    device = str(next(model.parameters()).device)
    if isinstance(model, PeftModel) and model.peft_type == _peft_type():
        model.add_adapter(adapter_name, config)
        model.load_adapter(place, adapter_name, is_trainable=is_trainable, torch_device=device)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with _silent("`is_gradient_checkpointing` is deprecated"):  # of PEFT 0.21 on transformers 5.24
        return PeftModel.from_pretrained(
            base, place, adapter_name, is_trainable, config=config, torch_device=device
        )


def check_weights_file(folder: str | Path) -> None:
    """Open an adapter's weights file without loading it.

    Raises:
        AdapterError: the file is missing, cut short or damaged.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read: it is missing, cut short or damaged ({error}). Save or copy "
            f"the adapter again."
        ) from error


def _check_weights(
    model: nn.Module, adapter_name: str, loaded: dict[str, Tensor], place: str | None
) -> None:
    """The weights must be exactly those of the adapter's routers."""
    where = "the adapter" if place is None else os.path.join(place, SAFETENSORS_WEIGHTS_NAME)
    what_to_do = "The config and the weights are not of one adapter; save or copy both again."
    there = model.state_dict()
    wanted = [key for key in there if f".{ROUTERS}.{adapter_name}." in key]
    missing = [key for key in wanted if key not in loaded]
    if missing:
        raise AdapterError(
            f"{where} lacks {len(missing)} of the {len(wanted)} router weights that its config "
            f"asks for; the first is {missing[0]}. {what_to_do}"
        )
    unknown = [key for key in loaded if key not in there]
    if unknown:
        raise AdapterError(
            f"{where} has {len(unknown)} weights that no router of its config has; the first is "
            f"{unknown[0]}. {what_to_do}"
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


def _local_folder(folder: str | Path) -> str:
    """The adapter's folder on this machine; a hub repository is fetched first."""
    _check_folder(folder)
    if os.path.isdir(folder):
        return str(folder)
    wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME]
    try:
        return snapshot_download(str(folder), allow_patterns=wanted)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise AdapterError(
            f"the folder {folder} does not exist here, and no hub repository of that name can be "
            f"fetched: {str(error).strip().splitlines()[0]}"
        ) from error


def _check_folder(folder: str | Path) -> None:
    """Refuse a folder that is not there or holds no adapter; names of the hub's pass."""
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            inside = sorted(path.parent.name for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
            raise AdapterError(
                f"the folder {folder} holds no {CONFIG_NAME}, so there is no adapter in it; "
                + (f"there is one in its folder {inside[0]}" if inside else "name another folder")
            )
    elif os.path.exists(folder):
        raise AdapterError(f"{folder} is a file; wanted the folder that save_adapter wrote")
    elif isinstance(folder, Path) or not _can_be_on_the_hub(folder):
        raise AdapterError(
            f"the folder {folder} does not exist; wanted the folder that save_adapter wrote, or "
            f"the name of a hub repository"
        )


def _can_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load_base(
    config: RouterTuningConfig, place: str, dtype: torch.dtype | str | None
) -> nn.Module:
    name = config.base_model_name
    if name is None:
        raise AdapterError(
            f"{place} names no base model; load it and pass it: load_adapter(folder, model)"
        )
    return load_model(name, dtype=dtype or "auto")


def _not_a_config(path: str, reason: object) -> str:
    return (
        f"{path} is no adapter config ({reason}): it was cut short or changed by hand. Save or "
        f"copy the adapter again."
    )


@contextmanager
def _silent(message: str) -> Iterator[None]:
    """Without a warning of PEFT's that is meant for something else than what we do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


if _peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=METHOD, config_cls=RouterTuningConfig, model_cls=RouterTuningModel, prefix=PREFIX
    )

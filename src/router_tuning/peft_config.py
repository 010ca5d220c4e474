"""The config of a router-tuning adapter as PEFT knows it, and how it is read and written.

`RouterTuningConfig` is a `RoutingConfig` (config.py: what is routed) with PEFT's fields beside it,
of an adapter type that this file adds to PEFT's list of names. It is read from a folder or the hub
only after a look at what lies there: a folder without an adapter, a config that is cut short or of
a newer format, and a weights file that cannot be opened are errors that say so.

Knows the names of an adapter's files and the names that PEFT makes public. Knows no model and no
router, and nothing of what the weights are: what PEFT builds from a config stands in peft_tuner.py.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig, PeftType
from safetensors import SafetensorError, safe_open

from router_tuning.card import write_card
from router_tuning.config import RoutingConfig
from router_tuning.embedded import ALIASES, models_folder, name_of, resolve
from router_tuning.errors import AdapterError, ConfigError, RouterTuningError
from router_tuning.lora import plain_options

METHOD = "router_tuning"
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
"""PEFT's names of an adapter's two files; its constants stand where only peft_tuner.py reaches."""


def peft_type() -> PeftType:
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
    """PEFT's list of base modules to train too. Must stay None: only routers, and LoRA, train."""

    lora: dict[str, Any] | None = None
    """LoRA in the same adapter: options of PEFT's LoraConfig, such as {"r": 8, "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"]} (lora.py lists them; a LoraConfig does too). An empty
    dict is PEFT's defaults, None no LoRA.
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type()
        self.check()
        if self.modules_to_save:
            raise ConfigError(
                f"modules_to_save must be None, since only routers train and the base model stays "
                f"as it is; got {self.modules_to_save!r}"
            )
        if self.lora is not None:
            self.lora = plain_options(self.lora)
        # What was left to PEFT is chosen on attaching, for each model anew.
        self._targets_are_usual = self.lora is not None and not self.lora.get("target_modules")
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
        check_folder(place if os.path.isdir(name) else name)
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


def check_folder(folder: str | Path) -> None:
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


def _not_a_config(path: str, reason: object) -> str:
    return (
        f"{path} is no adapter config ({reason}): it was cut short or changed by hand. Save or "
        f"copy the adapter again."
    )

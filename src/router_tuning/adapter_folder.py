"""An adapter's folder: `save_adapter(model, folder)` and `load_adapter(folder)`.

Three files: the config, the weights, the model card. An interrupted save leaves the old ones whole.
Loading fetches a hub repository first, looks at the config and the weights file before anything is
loaded, and loads the base model that the adapter names unless one is given.

Knows files, and in which order they are written and checked. Both functions go through what PEFT
makes public, so a folder loads with PEFT's own `PeftModel.from_pretrained` too. What a config must
say stands in peft_config.py; how routers come into a model, and which weights fit them, in
peft_tuner.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from router_tuning.card import FILE_NAME as CARD_NAME
from router_tuning.embedded import load_model
from router_tuning.errors import AdapterError, ConfigError
from router_tuning.peft_config import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    RouterTuningConfig,
    check_folder,
    check_weights_file,
    peft_type,
)
from router_tuning.peft_tuner import silent


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
    if isinstance(model, PeftModel) and model.peft_type == peft_type():
        model.add_adapter(adapter_name, config)
        model.load_adapter(place, adapter_name, is_trainable=is_trainable, torch_device=device)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with silent("`is_gradient_checkpointing` is deprecated"):  # of PEFT 0.21 on transformers 5.24
        return PeftModel.from_pretrained(
            base, place, adapter_name, is_trainable, config=config, torch_device=device
        )


def _local_folder(folder: str | Path) -> str:
    """The adapter's folder on this machine; a hub repository is fetched first."""
    check_folder(folder)
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


def _load_base(
    config: RouterTuningConfig, place: str, dtype: torch.dtype | str | None
) -> nn.Module:
    name = config.base_model_name
    if name is None:
        raise AdapterError(
            f"{place} names no base model; load it and pass it: load_adapter(folder, model)"
        )
    return load_model(name, dtype=dtype or "auto")

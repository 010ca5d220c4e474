"""Loading models and adapters for a verb, with what people see meanwhile. Imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from router_tuning.adapter_folder import load_adapter
from router_tuning.cli.console import bar, warn
from router_tuning.cli.material import Recipe, held_back
from router_tuning.config import CALIBRATION_WINDOWS
from router_tuning.data import Windows
from router_tuning.embedded import load_model, load_tokenizer, resolve
from router_tuning.errors import AdapterError, ConfigError
from router_tuning.peft_config import RouterTuningConfig

RECORD = "tune.json"
"""What `tune` leaves beside an adapter: its options and results."""
WORK = "checkpoints"
"""Where `tune` keeps what only a resumed tuning needs."""
ANSWERS = "answers.jsonl"
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the name that both were loaded by."""

    model: Any
    tokenizer: Any
    name: str


def load_base(name: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a base model for inference or tuning."""
    quiet_libraries()
    place = pick_device(device)
    resolve(name)  # what is made on first use says so itself
    with bar(f"Loading {name}"):
        wanted = "float32" if dtype == "auto" and place.type == "cpu" else dtype
        model = load_model(name, dtype=wanted, device=place)
        tokenizer = load_tokenizer(name)
    return Loaded(model, tokenizer, name)


def load_routed(
    folder: str, base: str | None = None, dtype: str = "auto", device: str = "auto"
) -> Loaded:
    """Load an adapter on its base model, or on the one that is named.

    Raises:
        AdapterError: the folder is no adapter, or names no base model.
        BaseModelMismatchError: the base model is another one.
    """
    quiet_libraries()
    name = base or base_name(folder)
    loaded = load_base(name, dtype, device)
    return Loaded(load_adapter(folder, loaded.model).eval(), loaded.tokenizer, name)


def base_name(folder: str) -> str:
    """The base model that an adapter names."""
    name = RouterTuningConfig.from_pretrained(folder).base_model_name
    if not name:
        raise AdapterError(f"{folder} names no base model; name it with --model")
    return name


def pick_device(device: str) -> torch.device:
    """The device of a name; `auto` is cuda where there is one."""
    if device not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device]:
        raise ConfigError(f"--device {device}: torch sees no such device here; use --device cpu")
    return torch.device(device)


def quiet_libraries() -> None:
    """No bars and no hints of transformers between ours."""
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def record_of(folder: str) -> dict[str, Any] | None:
    """What `tune` or `demo` left beside an adapter; None without it, or where it cannot be read."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "recipe": Recipe(**record["recipe"]), "settings": {**record["settings"]}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{path} cannot be read ({error}), so what the adapter was tuned on is not known")
        return None


def recipe_of(folder: str) -> Recipe | None:
    """The text an adapter was tuned on, from the record beside it; None without one."""
    record = record_of(folder)
    return None if record is None else record["recipe"]


def default_recipe(seed: int) -> Recipe:
    """The text where an adapter's own is not known: fresh answers to the shipped prompts."""
    warn(f"no {RECORD} beside the adapter, so fresh answers to shipped prompts are taken")
    return Recipe(None, 256, 1, CALIBRATION_WINDOWS, prompts=300, answer_tokens=128, seed=seed)


def text_held_back(folder: str, loaded: Loaded, seed: int) -> tuple[Windows, str]:
    """Windows of an adapter's kind of text that it was not tuned on, and their name."""
    recipe = recipe_of(folder) or default_recipe(seed)
    answers = Path(folder) / WORK / ANSWERS
    windows = held_back(recipe, loaded.model, loaded.tokenizer, answers=answers)
    return windows, f"held back of {recipe.name}"

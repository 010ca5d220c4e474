"""Reads the routers of a checkpoint of the paper's official code into an adapter of ours.

What it writes is a folder with config.json and model.safetensors. Each routed decoder layer has one
linear map without a bias, `model.layers.<i>.router.weight` (1, D). The config says which layers are
routed (`is_mindskip` in the code of 2024, `is_mod` since; a bool a layer), the `granularity`, and
the `threshold`. A unit runs there where sigmoid(w x) >= threshold, so here where w x + b >= 0 with
b = -log(threshold / (1 - threshold)): the same decisions, up to the rounding of a sigmoid.

Two kinds of code wrote such checkpoints, and `granularity` means other things to them:

- Model files of their own (model types that end in _mindskip or _mod) skip attention for whole
  sequences, whatever stands behind "attn", and route nothing else. A skipped sequence writes no
  keys.
- The patch of 2026 computes all and masks. It knows all six names, and every token writes its keys.
  Its router of an MLP reads what the attention reads, which ours does not: it cannot be taken over.

Sequences are pooled there by a mean over all that a forward is given, the answer and the padding
included. Here that is `pooling="official"`, for comparison; while an answer is made over a cache,
all that it is given is the prompt, which is `pooling="prompt"`.

Shapes: D hidden.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from router_tuning.errors import AdapterError, BaseModelMismatchError
from router_tuning.execution.context import routers_of, routing_of
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.peft_tuner import RouterLayer
from router_tuning.routers import LinearRouter
from router_tuning.units import decoder_layers, decoder_of, hidden_size_of, is_sequence

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ROUTED_LAYERS = ("is_mindskip", "is_mod")
SKIPPING_TYPES = ("_mindskip", "_mod")
ROUTER_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.router\.(\w+)")
SAVE_AGAIN = "Copy the checkpoint again, or save it again with the official code."
LOOKS_AHEAD = (
    'pooling="official" decides by the mean over a whole text, the answer that is scored and the '
    "padding included, as the official code does: it knows what it is to predict, and depends on "
    'the batch. It is for comparison alone; use pooling="prompt" for anything else'
)


@dataclass(frozen=True)
class OfficialRouters:
    """What an official checkpoint says."""

    granularity: str
    """By our names."""
    threshold: float
    """Of the sigmoid, in (0, 1)."""
    kv: str
    """What becomes of the keys of skipped tokens, by our names."""
    weights: dict[int, Tensor]
    """Of each routed layer's router: (D,), float32."""
    num_layers: int
    """Of the model that they were trained on."""
    capacity: float | None
    """The share of executions of the routed layers that training aimed at; None without a target.
    """
    shape: dict[str, Any]
    """What else is said of that model: model_type and vocab_size."""


def import_official(
    checkpoint: str | Path | OfficialRouters, model: nn.Module, *, pooling: str = "prompt"
) -> PeftModel:
    """Put the routers of an official checkpoint on their base model, as an adapter of ours.

    The checkpoint holds no base weights, so only the base's type and shape can be compared.

    Args:
        checkpoint: the folder that the official code wrote, or what was read from it.
        model: the base model that the routers were trained on.
        pooling: of sequence granularities.

    Returns:
        The PEFT model, not calibrated: it runs at the checkpoint's own threshold.

    Raises:
        AdapterError: missing, damaged, or nothing that we can route.
        BaseModelMismatchError: the checkpoint was made on a model of another shape.
    """
    found = checkpoint if isinstance(checkpoint, OfficialRouters) else read_official(checkpoint)
    _check_base(found, model)
    sequence = is_sequence(found.granularity)
    if sequence and pooling == "official":
        warnings.warn(LOOKS_AHEAD, stacklevel=2)
    config = RouterTuningConfig(
        granularity=found.granularity,
        layers=sorted(found.weights),
        kv=found.kv,
        budget=_budget(found),
        pooling=pooling if sequence else "prefix",  # tokens are not pooled
    )
    routed = get_peft_model(model, config)
    assert isinstance(routed, PeftModel)
    bias = -math.log(found.threshold / (1 - found.threshold))
    layers = routers_of(routed)
    for unit in routing_of(routed).units:
        layer = layers[unit.name]
        assert isinstance(layer, RouterLayer)
        router = layer.keep_logits[layer.active_adapters[0]]
        assert isinstance(router, LinearRouter)
        with torch.no_grad():
            router.score.weight.copy_(found.weights[unit.layer_idx][None])
            router.score.bias.fill_(bias)
    return routed


def read_official(checkpoint: str | Path) -> OfficialRouters:
    """What stands in a checkpoint's folder.

    Raises:
        AdapterError: missing, damaged, or nothing that we can route.
    """
    folder = Path(checkpoint)
    config = _read_config(folder)
    weights = _read_weights(folder / WEIGHTS_FILE)
    num_layers = config.get("num_hidden_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise AdapterError(
            f"{folder / CONFIG_FILE} should say num_hidden_layers, and says {num_layers!r}. "
            + SAVE_AGAIN
        )
    _check_layers(folder, config, weights, num_layers)
    granularity, kv = _granularity(folder, config)
    return OfficialRouters(
        granularity=granularity,
        threshold=_threshold(folder, config),
        kv=kv,
        weights=weights,
        num_layers=num_layers,
        capacity=_capacity(config, sorted(weights)),
        shape={name: config.get(name) for name in ("model_type", "vocab_size")},
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterError(
            f"no folder {folder}; wanted the output folder of the official code, with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} has no {CONFIG_FILE}, so it is no checkpoint of the official code. "
            + SAVE_AGAIN
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}). {SAVE_AGAIN}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, no config. {SAVE_AGAIN}")
    return config


def _read_weights(path: Path) -> dict[int, Tensor]:
    """The router of each layer that has one: (D,), float32."""
    weights: dict[int, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                match = ROUTER_KEY.fullmatch(name)
                if match is None:
                    continue
                if match[2] != "weight":
                    raise AdapterError(
                        f"{path} has {name}, but routers of the official code have a weight and "
                        "nothing else; it was written by other code, whose rule is not known here"
                    )
                weights[int(match[1])] = _one_router(path, name, file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read: it is missing, cut short or damaged ({error}). {SAVE_AGAIN}"
        ) from error
    if not weights:
        raise AdapterError(
            f"{path} holds no router: wanted model.layers.<i>.router.weight, got "
            f"{', '.join(names[:3]) or 'nothing'}. Name the folder that the official code saved "
            "its routers in (its output_dir)"
        )
    return weights


def _one_router(path: Path, name: str, weight: Tensor) -> Tensor:
    if weight.ndim != 2 or weight.shape[0] != 1 or not weight.is_floating_point():
        raise AdapterError(
            f"{path}: {name} is {weight.dtype} of shape {tuple(weight.shape)}, wanted floating "
            f"point numbers of shape (1, hidden size). {SAVE_AGAIN}"
        )
    if not bool(weight.isfinite().all()):
        raise AdapterError(f"{path}: {name} has numbers that are not finite. {SAVE_AGAIN}")
    return weight[0].float()


def _check_layers(
    folder: Path, config: dict[str, Any], weights: dict[int, Tensor], num_layers: int
) -> None:
    """The layers that the config routes must be those that have a router."""
    sizes = sorted({len(weight) for weight in weights.values()})
    if len(sizes) > 1:
        raise AdapterError(f"routers in {folder} have different widths: {sizes}. {SAVE_AGAIN}")
    routed = list(range(num_layers))
    for name in ROUTED_LAYERS:
        flags = config.get(name)
        if flags is None:
            continue
        if not isinstance(flags, list) or len(flags) != num_layers:
            came = f"{len(flags)} entries" if isinstance(flags, list) else repr(flags)
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {name} should say for each of {num_layers} layers "
                f"whether it is routed, and has {came}. {SAVE_AGAIN}"
            )
        routed = [index for index, flag in enumerate(flags) if flag]
        break
    else:  # an older config, overwritten since: the weights say it too
        routed = [index for index in routed if index in weights]
    if routed != sorted(weights):
        raise AdapterError(
            f"{folder}: the config routes layers {routed}, and there are routers of layers "
            f"{sorted(weights)}. {SAVE_AGAIN}"
        )


def _granularity(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Granularity and key policy, by our names."""
    said = str(config.get("granularity") or "attn_sequence").lower().replace("-", "_")
    own_files = "is_mindskip" in config or str(config.get("model_type")).endswith(SKIPPING_TYPES)
    if own_files and "attn" not in said:
        raise AdapterError(
            f"{folder}: granularity {said!r} routes nothing in the code that wrote it, which knows "
            "attention alone; there is nothing to import"
        )
    if own_files:
        if "token" in said:
            warnings.warn(
                f"{folder}: granularity {said!r} decides once a sequence in the code that wrote "
                "it, so it becomes attn_sequence",
                stacklevel=4,
            )
        return "attn_sequence", "kept"
    level = "token" if "token" in said else "sequence"
    if "block" in said:
        return f"block_{level}", "all"
    if "mlp" in said:
        raise AdapterError(
            f"{folder}: granularity is {said!r}. The official router of an MLP reads what its "
            "layer's attention reads, and ours what the MLP reads, so its weights mean nothing "
            "here; routers of attention and of blocks can be imported"
        )
    return f"attn_{level}", "all"


def _threshold(folder: Path, config: dict[str, Any]) -> float:
    threshold = config.get("threshold", 0.5)
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not 0 < threshold < 1:
        raise AdapterError(
            f"{folder / CONFIG_FILE}: threshold is {threshold!r}, wanted a number between 0 and 1, "
            f"both excluded: a sigmoid is compared with it. {SAVE_AGAIN}"
        )
    return float(threshold)


def _capacity(config: dict[str, Any], layers: list[int]) -> float | None:
    """`mod_capacity`: one number, or one a layer."""
    given: Any = config.get("mod_capacity")
    try:
        values = [float(given[i]) for i in layers] if isinstance(given, list) else [float(given)]
    except (TypeError, ValueError, IndexError):  # as where training had no target
        return None
    capacity = sum(values) / len(values)
    return capacity if 0 <= capacity <= 1 else None


def _budget(found: OfficialRouters) -> float:
    """The kept fraction, over all layers of the model, that training aimed at."""
    if found.capacity is None:
        return 1.0
    share = len(found.weights) / found.num_layers
    return max(1 - share * (1 - found.capacity), 1e-3)  # a budget is above 0


def _check_base(found: OfficialRouters, model: nn.Module) -> None:
    decoder: Any = decoder_of(model)
    (size,) = {len(weight) for weight in found.weights.values()}
    kind = str(found.shape["model_type"])
    for suffix in SKIPPING_TYPES:
        kind = kind.removesuffix(suffix)
    kinds = {decoder.config.model_type, getattr(getattr(model, "config", None), "model_type", None)}
    there: dict[str, Any] = {"layers": found.num_layers, "hidden size": size}
    here: dict[str, Any] = {
        "layers": len(decoder_layers(decoder)),
        "hidden size": hidden_size_of(model),
    }
    if found.shape["model_type"] is not None and kind not in kinds:
        there["model_type"], here["model_type"] = kind, decoder.config.model_type
    if found.shape["vocab_size"] is not None:
        there["vocabulary"] = found.shape["vocab_size"]
        here["vocabulary"] = decoder.config.vocab_size
    differing = [f"{k} {there[k]} there, {here[k]} here" for k in there if there[k] != here[k]]
    if differing:
        raise BaseModelMismatchError(
            f"the official checkpoint was made on another model than {_name(model)}: "
            f"{'; '.join(differing)}. Load the model that it was tuned on (--model)"
        )


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)

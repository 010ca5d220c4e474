"""Static export: an ordinary, shallower checkpoint without the blocks that routers hardly ever run.

`blocks_below` reads off a block-routed adapter which blocks a calibrated budget all but never runs;
`write_shallow` writes the base model without them: its layers and its config's lists are shortened
and counted anew. What is left runs for every token, so no router is needed, nor this package.
Before the folder gets its name, it is loaded the ordinary way and compared with the routed model
under the same static drop: a family whose config says more about layers than is known here is
refused.

Only blocks can be left out so. That a layer has no attention, or no MLP, no config of transformers
can say.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from router_tuning.baselines import StaticDrop
from router_tuning.config import ROUNDING, RoutingConfig, check_budget
from router_tuning.data import evaluation_mode
from router_tuning.embedded import load_model
from router_tuning.errors import (
    BudgetError,
    ConfigError,
    RouterTuningError,
    UnsupportedModelError,
)
from router_tuning.execution.context import decided_by, left_out_when_dense, routing_of
from router_tuning.units import (
    KINDS,
    decoder_layers,
    decoder_of,
    family_of,
    kinds_of,
    router_child,
    unwrap,
)

DROP_BELOW = 0.05
"""Blocks that run for a smaller share of the tokens are left out, unless told otherwise."""

NOT_BY_LAYER = ("architectures", "bos_token_id", "eos_token_id", "mlp_only_layers")
"""Lists of a config that do not have one entry a layer, however long they are."""
INDEX_LISTS = ("mlp_only_layers",)
"""Lists of indices of layers."""
LEADING_COUNTS = ("first_k_dense_replace",)
"""How many of the first layers are of another kind."""
CIRCUMSTANCES = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""What a config says of the files that it was read from."""

CHECKED_TOKENS = 64
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.03
"""Greatest difference of logits over the greatest logit: of equal models on two paths, by far."""


def blocks_below(
    config: RoutingConfig, drop_below: float = DROP_BELOW, budget: float | None = None
) -> dict[str, float]:
    """The blocks that a budget keeps for less than a share of the tokens: name -> kept fraction.

    Args:
        config: of a block-routed, calibrated adapter.
        drop_below: the share, in (0, 1].
        budget: a calibrated one; None takes the adapter's default.

    Raises:
        ConfigError: other units than blocks are routed, `drop_below` is out of range, or no block
            lies below it.
        BudgetError: the budget was not calibrated.
    """
    if kinds_of(config) != ("block",):
        raise ConfigError(
            f"granularity is {', '.join(config.granularities)}, but only whole blocks can be left "
            "out of an ordinary checkpoint: no config of transformers says that a layer has no "
            "attention, or no MLP. Tune an adapter with --granularity block_token, or serve this "
            "one with its routers"
        )
    if isinstance(drop_below, bool) or not 0 < drop_below <= 1:
        raise ConfigError(
            f"--drop-below is a share of the tokens, above 0 and at most 1; got {drop_below!r}"
        )
    entry = _calibrated(config, budget)
    kept: Mapping[str, float] = entry["kept_per_unit"]
    below = {name: share for name, share in kept.items() if share < drop_below}
    if below:
        return below
    least = min(kept, key=lambda name: kept[name])
    always = ""
    if "block_sequence" in config.granularities and config.pooling == "prefix":
        always = f" (the first {config.decide_after} tokens of a sequence always run, and count)"
    raise ConfigError(
        f"at budget {entry['budget']:g} no block runs for less than {drop_below:g} of the tokens, "
        f"so there is nothing to leave out; the least is {least} with {kept[least]:.3f}{always}. "
        "Give a larger --drop-below, or a smaller --budget"
    )


def _calibrated(config: RoutingConfig, budget: float | None) -> Mapping[str, Any]:
    """The calibration entry of a budget, which says how often each unit ran."""
    known = [e for e in config.calibration if e.get("kept_per_unit")]
    if not known:
        raise BudgetError(
            "the adapter has no calibrated budget that says how often each block runs; run "
            "`router-tuning calibrate` first"
        )
    listed = ", ".join(f"{e['budget']:g}" for e in known)
    wanted = config.default_budget if budget is None else check_budget(budget)
    if wanted is None:
        raise BudgetError(f"the adapter has no default budget; name one of {listed} with --budget")
    for entry in known:
        if abs(float(entry["budget"]) - wanted) <= ROUNDING:
            return entry
    raise BudgetError(
        f"how often blocks run at budget {wanted:g} was not measured; name one of {listed} with "
        f"--budget, or calibrate it with `router-tuning calibrate --budgets {wanted:g}`"
    )


def check_droppable(model: nn.Module, dropped: Collection[str]) -> None:
    """Refuse what cannot be exported, before time is spent on it.

    Raises:
        ConfigError: a name of no routed block, or no block would be left.
        UnsupportedModelError: the weights are no plain numbers, or another adapter holds some.
    """
    StaticDrop(dropped).check(routing_of(model).units)
    decoder, causal = decoder_of(model), unwrap(model)
    gone = _indices(model, dropped)
    if not gone:
        raise ConfigError("no block to leave out was named; see blocks_below")
    if len(gone) == len(decoder_layers(decoder)):
        raise ConfigError(
            f"all {len(gone)} blocks would be left out, and nothing would be left; give a smaller "
            "--drop-below, or a larger --budget"
        )
    if any(left_out_when_dense(module) for module in causal.modules()):
        raise UnsupportedModelError(
            "the adapter has LoRA of its own, which the checkpoint would lack: it holds the base "
            "model's weights as they are. Tune an adapter without LoRA, on a model into which LoRA "
            "was merged (merge_and_unload) if there is to be one"
        )
    for name, tensor in _base_state(causal).items():
        if ".base_layer." in name:
            raise UnsupportedModelError(
                f"another adapter wraps {name.partition('.base_layer.')[0]}; merge it into the "
                "base model first (merge_and_unload), and export from that"
            )
        if tensor.is_meta or type(tensor.data) is not Tensor or _is_packed(name, tensor):
            raise UnsupportedModelError(
                f"the weights of {name} are quantised, sharded or not in memory "
                f"({tensor.dtype}), and cannot be written as plain numbers; load the base model "
                "in float32, bfloat16 or float16 on one device"
            )


def _is_packed(name: str, tensor: Tensor) -> bool:
    number = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return name.endswith("weight") and not number


def write_shallow(
    model: nn.Module,
    dropped: Collection[str],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    notices: Sequence[Path] = (),
) -> nn.Module:
    """Write the base model without some blocks, and load what was written.

    The folder appears whole or not at all: it is made beside its place, loaded, compared, renamed.
    Needs memory for the shallower model beside the model itself.

    Args:
        model: routed by blocks; it is left as it is.
        dropped: names of routed blocks, such as "layers.3.block".
        folder: new, or empty.
        tokenizer: written beside the weights, if given.
        notices: files copied beside the weights, such as the base model's licence.

    Returns:
        The written model, as plain transformers load it, on the model's device and in its dtype.

    Raises:
        ConfigError: see check_droppable; or the folder holds something.
        UnsupportedModelError: see check_droppable; or the config of this family cannot express it.
        RouterTuningError: the folder cannot be written.
    """
    check_droppable(model, dropped)
    folder = Path(folder)
    check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            made = scratch / "model"
            made.mkdir()  # with the permissions of any folder; a temporary one's are narrower
            _shallow(model, dropped).save_pretrained(made)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            for notice in notices:
                shutil.copy(notice, made)
            loaded = _checked(model, dropped, made)
            os.replace(made, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RouterTuningError(
            f"cannot write the checkpoint to {folder}: {reason}. Nothing of it was left. Make "
            "room, make the place writable, or choose another"
        ) from error
    loaded.name_or_path = loaded.config._name_or_path = str(folder)
    return loaded


def check_new(folder: Path) -> None:
    """Refuse a place that holds something already.

    Raises:
        ConfigError: it does.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; an export is written as a whole: name a new one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a new folder for the checkpoint")


def _indices(model: nn.Module, dropped: Collection[str]) -> list[int]:
    return sorted({u.layer_idx for u in routing_of(model).units if u.name in dropped})


def _base_state(causal: nn.Module) -> dict[str, Tensor]:
    """The base model's weights under its own names."""
    routers = tuple(f".{router_child(kind)}." for kind in KINDS)
    state = causal.state_dict()
    return {name: t for name, t in state.items() if not any(mark in name for mark in routers)}


def _shallow(model: nn.Module, dropped: Collection[str]) -> Any:
    """A model of the shorter config around the very tensors of the base model."""
    causal: Any = unwrap(model)
    gone = _indices(model, dropped)
    try:
        config = shorter_config(causal.config, gone)
        with torch.device("meta"):
            shallow = type(causal)(config)
        shallow.load_state_dict(_state_without(model, gone), assign=True)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(causal).__name__} without layers {', '.join(map(str, gone))} is not what its "
            f"shorter config describes ({str(error).strip().splitlines()[0]}), so no ordinary "
            "checkpoint can express it"
        ) from error
    shallow.tie_weights()
    shallow.generation_config = causal.generation_config
    return shallow


def _state_without(model: nn.Module, gone: Sequence[int]) -> dict[str, Tensor]:
    """The base model's weights without some layers, the others counted anew."""
    causal, decoder = unwrap(model), decoder_of(model)
    (within,) = (name for name, module in causal.named_modules() if module is decoder)
    prefix = f"{within}.{family_of(decoder).layers}." if within else f"{family_of(decoder).layers}."
    left = [i for i in range(len(decoder_layers(decoder))) if i not in gone]
    state = {}
    for name, tensor in _base_state(causal).items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) in left:
            state[f"{prefix}{left.index(int(index))}.{rest}"] = tensor
    return state


def shorter_config(config: Any, gone: Sequence[int]) -> Any:
    """A model's config without some layers: their number, and all that it says layer by layer."""
    text = config.get_text_config()
    fields = config.to_dict()
    inner = next((k for k in fields if text is not config and getattr(config, k) is text), None)
    part: dict[str, Any] = fields if inner is None else fields[inner]
    number = int(text.num_hidden_layers)
    left = [index for index in range(number) if index not in gone]
    for name, value in part.items():
        if name in INDEX_LISTS and value:
            part[name] = [left.index(index) for index in value if index in left]
        elif name in LEADING_COUNTS and value:
            part[name] = sum(index < value for index in left)
        elif name not in NOT_BY_LAYER and isinstance(value, list) and len(value) == number:
            part[name] = [value[index] for index in left]
    part[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(left)
    for name in CIRCUMSTANCES:
        fields.pop(name, None)
        part.pop(name, None)
    return type(config).from_dict(fields)


def _checked(model: nn.Module, dropped: Collection[str], made: Path) -> Any:
    """What was written, loaded, after it was compared with the routed model."""
    parameter = next(unwrap(model).parameters())
    loaded = load_model(str(made), dtype=parameter.dtype, device=parameter.device)
    vocabulary = int(loaded.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (1, CHECKED_TOKENS), generator=generator)
    ids_BT = ids_BT.to(parameter.device)
    with torch.no_grad(), evaluation_mode(model):
        with decided_by(model, StaticDrop(dropped)):
            wanted_BTV = unwrap(model)(input_ids=ids_BT, use_cache=False).logits.float()
        came_BTV = loaded(input_ids=ids_BT, use_cache=False).logits.float()
    allowed = TOLERANCE.get(parameter.dtype, HALF_TOLERANCE) * float(wanted_BTV.abs().max())
    if not bool(((came_BTV - wanted_BTV).abs() <= allowed).all()):
        difference = float((came_BTV - wanted_BTV).abs().max())
        raise UnsupportedModelError(
            f"the shallower {type(unwrap(model)).__name__} gives other logits than the same blocks "
            f"skipped by routers (off by {difference:.3g}, allowed {allowed:.3g}): its config says "
            "more about single layers than is known here, so it was not kept. Please report this "
            "family"
        )
    return loaded

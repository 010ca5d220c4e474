"""Where attention, MLP and block sit in each model family. The only file that knows family names.

A *unit* is what one routing decision runs or skips: the attention or the MLP of one decoder layer,
or the layer as a whole (a block). A family that is not in the table is found by its structure,
where that leaves no doubt. To add one, add a row to FAMILIES; CONTRIBUTING.md ("A new model
family") has the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import ConfigError, UnsupportedModelError

KINDS = ("attn", "mlp", "block")
"""Kinds of units, in the order in which a decoder layer runs them."""


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder and of its layers, and what is special about them."""

    layers: str = "layers"
    """The list of decoder layers."""
    modules: Mapping[str, str] = field(default_factory=lambda: {"attn": "self_attn", "mlp": "mlp"})
    """The modules of a layer that units of each kind run; a block is the layer itself."""
    input_norm: Sequence[str] = ("input_layernorm",)
    """Names, of which a layer has one, of the norm that it begins with. Empty for a post-norm
    family, whose units read the raw residual.
    """
    post_norms: Mapping[str, str] = field(default_factory=dict)
    """The norms that are put on a unit's output before it is added to the residual."""
    parts: bool = False
    """Whether the attention is plainly the parts of execution/projections.py. The keys of skipped
    tokens are then made alone; else all that the attention computes before its keys is.
    """
    keywords: bool = True
    """Whether decoder and layers hand unknown keyword arguments on, down to the attention."""
    layer_tuple: bool = False
    """Whether a layer returns its hidden states as the first of a tuple."""
    mlp_tuple: bool = False
    """Whether an MLP does."""
    blocks: bool = True
    """Whether a layer is a function of one stream of hidden states, so that it can be skipped."""


PRE_NORM = Family()
PLAIN = Family(parts=True)
POST_NORMS = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
SANDWICH = Family(post_norms=POST_NORMS)
POST_NORM = Family(post_norms=POST_NORMS, input_norm=())

FAMILIES: dict[str, Family] = {
    "cohere2": PRE_NORM,
    "deepseek_v3": PRE_NORM,
    "falcon": Family(
        layers="h",
        modules={"attn": "self_attention", "mlp": "mlp"},
        input_norm=("input_layernorm", "ln_attn"),
        keywords=False,
        layer_tuple=True,
    ),
    "gemma2": SANDWICH,
    "gemma3_text": replace(SANDWICH, parts=True),
    "gemma3n_text": replace(SANDWICH, blocks=False),
    "gemma4_text": SANDWICH,
    "gpt2": Family(layers="h", modules={"attn": "attn", "mlp": "mlp"}, input_norm=("ln_1",)),
    "gpt_neox": Family(modules={"attn": "attention", "mlp": "mlp"}),
    "gpt_oss": Family(mlp_tuple=True),
    "granite": PLAIN,
    "llama": PLAIN,
    "mistral": PLAIN,
    "mixtral": PLAIN,
    "olmo2": POST_NORM,
    "olmoe": PRE_NORM,
    "phi3": PRE_NORM,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "qwen3_moe": PLAIN,
    "qwen3_next": PRE_NORM,
    "smollm3": PRE_NORM,
}


@dataclass(frozen=True)
class Unit:
    """One routed unit: its name ("layers.3.attn"), its kind ("attn" or "mlp") and its decoder
    layer's index.
    """

    name: str
    kind: str
    layer_idx: int


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model unchanged."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers, in a causal LM, a multimodal model, a PEFT model or
    itself.

    Raises:
        UnsupportedModelError: no decoder of a known family, or of a plain structure, is inside.
    """
    whole = unwrap(model)
    for known in (_known_family, _found_family):
        for module in whole.modules():
            if known(module) is not None:
                return module
    raise UnsupportedModelError(
        f"no unit table for model_type {_model_type(whole)!r}, and its structure leaves doubt "
        f"where attention and MLP are. Known: {', '.join(sorted(FAMILIES))}. "
        f'Add a row to FAMILIES in units.py, see CONTRIBUTING "A new model family".'
    )


def family_of(decoder: nn.Module) -> Family:
    """The family of a module that `decoder_of` returned."""
    family = _known_family(decoder) or _found_family(decoder)
    assert family is not None
    return family


def _known_family(module: nn.Module) -> Family | None:
    family = FAMILIES.get(str(_model_type(module)))
    if family is None or not isinstance(getattr(module, family.layers, None), nn.ModuleList):
        return None
    return family


def _found_family(module: nn.Module) -> Family | None:
    """A family by structure: one list of layers, of which each has one attention and one MLP."""
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    if _model_type(module) in FAMILIES:
        return None
    number = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, child)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == number
    ]
    if len(lists) != 1 or not number:
        return None
    name, layers = lists[0]
    shapes = {_layer_shape(layer) for layer in layers}
    if len(shapes) != 1 or None in shapes:
        return None
    attention, mlp, norm, post_norms = shapes.pop()  # type: ignore[misc]
    return Family(
        layers=name,
        modules={"attn": attention, "mlp": mlp},
        input_norm=(norm,) if norm else (),
        post_norms=dict(post_norms),
        keywords=False,
    )


ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
INPUT_NORMS = ("input_layernorm", "ln_1", "norm1", "attention_norm", "attn_norm", "ln_attn")

Shape = tuple[str, str, str | None, tuple[tuple[str, str], ...]]


def _layer_shape(layer: nn.Module) -> Shape | None:
    """Names of attention, MLP, input norm and post-norms of a layer; None where they are not
    plain.
    """
    children = [name for name, _ in layer.named_children()]
    attentions = [name for name in children if name in ATTENTIONS]
    mlps = [name for name in children if name in MLPS]
    norms = [name for name in children if name in INPUT_NORMS]
    others = [n for n in children if "attn" in n or "attention" in n or "mixer" in n]
    posts = tuple(POST_NORMS.items()) if POST_NORMS["mlp"] in children else ()
    unclear = [n for n in others if n not in attentions and "norm" not in n and "dropout" not in n]
    if len(attentions) != 1 or len(mlps) != 1 or len(norms) > 1 or unclear:
        return None
    if not norms and not posts:
        return None
    return attentions[0], mlps[0], norms[0] if norms else None, posts


def _model_type(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder layers that the model runs, in order."""
    model: Any = decoder
    layers = getattr(model, family_of(decoder).layers)
    return list(layers)[: model.config.num_hidden_layers]


def part_of(decoder: nn.Module, layer: nn.Module, kind: str) -> nn.Module:
    """The module that a unit of this kind runs or skips: a part of a layer, or all of it."""
    part: nn.Module = layer if kind == "block" else getattr(layer, family_of(decoder).modules[kind])
    return part


def attention_of(decoder: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer; None where it has another mixer."""
    return getattr(layer, family_of(decoder).modules["attn"], None)


def post_norm_of(decoder: nn.Module, layer: nn.Module, kind: str) -> nn.Module | None:
    """The norm between a unit and the residual, in sandwich and post-norm families; else None."""
    name = family_of(decoder).post_norms.get(kind)
    return None if name is None else getattr(layer, name)


def input_norm_of(decoder: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The norm that a layer begins with; None in post-norm families."""
    names = family_of(decoder).input_norm
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def first_of(output: Any) -> Tensor:
    """The hidden states of what a module returned."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def router_child(kind: str) -> str:
    """Name of the router beside a unit, as a child of the decoder layer."""
    return f"skip_router_{kind}"


def kinds_of(config: RoutingConfig) -> tuple[str, ...]:
    """The kinds of units that a config routes, in the order in which a layer runs them."""
    routed = {kind_of(granularity) for granularity in config.granularities}
    return tuple(kind for kind in KINDS if kind in routed)


def hidden_size_of(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(decoder_of(model).config.hidden_size)  # type: ignore[union-attr, arg-type]


def kind_of(granularity: str) -> str:
    """The unit kind of a granularity: "attn_token" -> "attn"."""
    return granularity.partition("_")[0]


def granularity_of(config: RoutingConfig, unit: Unit) -> str:
    """The granularity under which a config routes a unit."""
    return next(g for g in config.granularities if kind_of(g) == unit.kind)


def is_sequence(granularity: str) -> bool:
    """Whether a granularity decides once for a sequence."""
    return granularity.endswith("_sequence")


def find_units(model: nn.Module, config: RoutingConfig) -> list[Unit]:
    """The units that a config routes in a model, in layer order.

    Raises:
        UnsupportedModelError: unknown family, or a layer without the unit.
        ConfigError: a layer index that the model does not have.
    """
    decoder = decoder_of(model)
    num_layers = len(decoder_layers(decoder))
    wanted = range(num_layers) if config.layers is None else sorted(set(config.layers))
    for index in wanted:
        if not 0 <= index < num_layers:
            raise ConfigError(
                f"layers names layer {index}, but the model has {num_layers} layers (0 to "
                f"{num_layers - 1})"
            )
    return list(_units(decoder, wanted, config))


def _units(decoder: nn.Module, wanted: range | list[int], config: RoutingConfig) -> Iterator[Unit]:
    layers = decoder_layers(decoder)
    refused: dict[str, str] = {}
    found = False
    for index in wanted:
        for kind in kinds_of(config):
            why = unroutable(decoder, layers[index], kind)
            if why is None:
                found = True
                yield Unit(f"layers.{index}.{kind}", kind, index)
            else:
                refused[f"layers.{index}.{kind}"] = why
    if refused and (config.layers is not None or not found):
        name, why = next(iter(refused.items()))
        raise UnsupportedModelError(
            f"{name} cannot be routed: it {why} (so do {len(refused) - 1} more: "
            f"{', '.join(list(refused)[1:6]) or 'none'}); leave these layers out of `layers`, or "
            f"route another kind of unit"
        )


def unroutable(decoder: nn.Module, layer: nn.Module, kind: str) -> str | None:
    """Why a unit of this kind cannot be routed in a layer, as what "it" does; None where it can."""
    if kind == "mlp":
        has = hasattr(layer, family_of(decoder).modules["mlp"])
        return None if has else "has no MLP of its own"
    attention = attention_of(decoder, layer)
    if attention is None:
        return f"has no attention ({type(layer).__name__} mixes its tokens in another way)"
    if getattr(attention, "is_kv_shared_layer", False):
        return "reads the keys of another layer"
    if getattr(attention, "store_full_length_kv", False):
        return "stores keys that other layers read"
    if getattr(getattr(decoder, "config", None), "alibi", False):
        return "tells positions by ALiBi, whose biases are not made for kept tokens"
    if kind == "block" and not family_of(decoder).blocks:
        return "works on several streams of hidden states at once"
    return None

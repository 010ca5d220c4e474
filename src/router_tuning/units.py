"""Where attention, MLP, block and experts sit in each model family. The only file that knows family
names.

A *unit* is what one routing decision runs or skips: the attention or the MLP of one decoder layer,
or the layer as a whole (a block). A family that is not in the table is found by its structure,
where that leaves no doubt. To add one, add a row to FAMILIES; CONTRIBUTING.md ("A new model
family") has the steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from router_tuning.config import RoutingConfig
from router_tuning.errors import ConfigError, UnsupportedModelError

KINDS = ("attn", "mlp", "block")
"""Kinds of units, in the order in which a decoder layer runs them."""
ADD_A_ROW = 'Add a row to FAMILIES in units.py, see CONTRIBUTING "A new model family".'


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
    expands_keys: bool = False
    """Whether what the attention hands to its cache is a short form of its keys."""
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
    "deepseek_v3": Family(expands_keys=True),
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
    "glm4": Family(post_norms={"attn": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}),
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
    """One routed unit: its name ("layers.3.attn"), its kind ("attn", "mlp" or "block") and its
    decoder layer's index.
    """

    name: str
    kind: str
    layer_idx: int
    elsewhere: int | None = None
    """The layer in whose part of the cache a sequence decision is remembered, where the unit's own
    layer has no plain one.
    """

    @property
    def memory(self) -> int:
        """The layer in whose part of the cache a sequence decision is remembered."""
        return self.layer_idx if self.elsewhere is None else self.elsewhere


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
    doubts = [why for module in whole.modules() if isinstance(why := _structure(module), str)]
    doubt = doubts[0] if doubts else "it has no list of decoder layers that its config counts"
    raise UnsupportedModelError(
        f"no unit table for model_type {_model_type(whole)!r}, and its structure leaves doubt "
        f"where attention and MLP are: {doubt}. Known: {', '.join(sorted(FAMILIES))}. {ADD_A_ROW}"
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


_found: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()
# Reading a structure takes a walk over all layers, and families are asked for at every unit.


def is_found(decoder: nn.Module) -> bool:
    """Whether the family of a decoder was found by its structure, so that nobody has tested it."""
    return _known_family(decoder) is None


def _found_family(module: nn.Module) -> Family | None:
    """A family by structure: one list of layers, of which each has at most one attention and MLP,
    under names that leave no doubt.
    """
    if module not in _found:
        family = _structure(module)
        if not isinstance(family, Family):
            return None
        _found[module] = family
    return _found[module]


ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
INPUT_NORMS = (
    *("input_layernorm", "attention_layernorm", "self_attn_layer_norm", "ln_1", "ln_attn"),
    *("norm1", "attention_norm", "attn_norm"),
)

MIXING = ("attn", "attention", "mixer", "conv")
FEEDING = ("mlp", "ffn", "feed_forward", "moe", "expert")
"""Parts of names that tell of an attention, and of an MLP."""


def _structure(module: nn.Module) -> Family | str | None:
    """The family of a module by its structure, or what leaves doubt; None where it has no layers
    with attention.
    """
    config = getattr(module, "config", None)
    number = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, list(child))
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and any(_named(x, ATTENTIONS) for x in child)
    ]
    if _model_type(module) in FAMILIES or not lists:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose layers attend to a second sequence"
    if "input_ids" not in inspect.signature(type(module).forward).parameters:
        return f"the layers are in {type(module).__name__}, which takes no input_ids"
    if len(lists) > 1 or len(lists[0][1]) != number:
        counts = ", ".join(f"{len(layers)} {name}" for name, layers in lists)
        return f"its config counts {number} layers, and it has {counts}"
    name, layers = lists[0]
    doubt = next((why for layer in layers if (why := _doubt(layer)) is not None), None)
    return doubt or _family(name, layers)


def _named(layer: nn.Module, names: Sequence[str]) -> list[str]:
    """The children of a layer that have one of these names."""
    return [name for name, _ in layer.named_children() if name in names]


def _doubt(layer: nn.Module) -> str | None:
    """What is not plain about a layer; None if all is."""
    kind = type(layer).__name__
    for what, names in (("attention", ATTENTIONS), ("MLP", MLPS), ("input norm", INPUT_NORMS)):
        found = _named(layer, names)
        if len(found) > 1:
            return f"{kind} has more than one {what} ({', '.join(found)})"
    for name, child in layer.named_children():
        plain = name in (*ATTENTIONS, *MLPS) or name.startswith(router_child(""))
        leaf = isinstance(child, (nn.Dropout, nn.Identity, nn.Linear)) or "norm" in name
        # Where no attention is named, a mixer of another kind takes its place: none is routed.
        words = (*MIXING, *FEEDING) if _named(layer, ATTENTIONS) else FEEDING
        if not plain and not leaf and any(word in name for word in words):
            return f"{kind} has another part {name!r}, which may belong to attention or MLP"
    return None


def _family(name: str, layers: list[nn.Module]) -> Family | str:
    """The family of plain layers; they may differ in which of the parts they have."""
    kinds = {"attn": ATTENTIONS, "mlp": MLPS}
    found = {
        kind: sorted({n for layer in layers for n in _named(layer, names)})
        for kind, names in kinds.items()
    }
    if any(len(names) > 1 for names in found.values()):
        return f"its layers name their parts differently ({found})"
    attending = next(layer for layer in layers if _named(layer, ATTENTIONS))
    posts = _named(attending, tuple(POST_NORMS.values()))
    return Family(
        layers=name,
        modules={kind: names[0] if names else f"no {kind}" for kind, names in found.items()},
        input_norm=tuple({n for layer in layers for n in _named(layer, INPUT_NORMS)}),
        post_norms=POST_NORMS if len(posts) == len(POST_NORMS) else {},
        keywords=False,
    )


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


def experts_of(decoder: nn.Module, layer: nn.Module) -> nn.Module | None:
    """What holds the experts of a layer's MLP, and is called with tokens and the experts that each
    goes to; None where the MLP is no mixture of experts.
    """
    experts = getattr(getattr(layer, family_of(decoder).modules["mlp"], None), "experts", None)
    return experts if isinstance(experts, nn.Module) else None


def mixture_layers(decoder: nn.Module) -> dict[int, nn.Module]:
    """The experts of each decoder layer that has some, by the layer's index."""
    found = {index: experts_of(decoder, x) for index, x in enumerate(decoder_layers(decoder))}
    return {index: experts for index, experts in found.items() if experts is not None}


def post_norm_of(decoder: nn.Module, layer: nn.Module, kind: str) -> nn.Module | None:
    """The norm between a unit and the residual, in sandwich and post-norm families; else None.

    A layer that has only some of these norms has them before its parts, as layers of other families
    do: a model may mix both.
    """
    names = family_of(decoder).post_norms
    if kind not in names or not all(hasattr(layer, name) for name in names.values()):
        return None
    norm: nn.Module = getattr(layer, names[kind])
    return norm


def input_norm_name(decoder: nn.Module, layer: nn.Module) -> str | None:
    """The name of the norm that a layer begins with; None in post-norm families."""
    return next((name for name in family_of(decoder).input_norm if hasattr(layer, name)), None)


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


def sequence_kinds(config: RoutingConfig) -> frozenset[str]:
    """The kinds of units that a config decides for once a sequence."""
    return frozenset(kind_of(g) for g in config.granularities if is_sequence(g))


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
    layers, plain = decoder_layers(decoder), plain_cache_layers(decoder)
    refused: dict[str, str] = {}
    found: set[str] = set()
    for index in wanted:
        memory = min(plain, key=lambda i: (abs(i - index), i), default=None)
        for granularity in sorted(config.granularities, key=lambda g: KINDS.index(kind_of(g))):
            kind = kind_of(granularity)
            why = unroutable(decoder, layers[index], kind)
            if why is None and is_sequence(granularity) and memory is None:
                why = "finds no plain keys and values in the cache, beside which to remember"
            if why is None:
                found.add(kind)
                elsewhere = None if index in plain else memory
                yield Unit(f"layers.{index}.{kind}", kind, index, elsewhere)
            else:
                refused[f"layers.{index}.{kind}"] = why
    # A kind that no layer can route was asked for in vain, whatever else is routed.
    if refused and (config.layers is not None or found != set(kinds_of(config))):
        vain = (name for name in refused if name.rpartition(".")[2] not in found)
        name = next(vain, next(iter(refused)))
        why = refused.pop(name)
        others = ", ".join([*list(refused)[:5], *(["..."] if len(refused) > 5 else [])])
        raise UnsupportedModelError(
            f"{name} cannot be routed: it {why}"
            + (f" (nor can {others})" if others else "")
            + "; leave what cannot be routed out of `layers`, or route another kind of unit"
            + (f". The family was found by its structure. {ADD_A_ROW}" if is_found(decoder) else "")
        )


def unroutable(decoder: nn.Module, layer: nn.Module, kind: str) -> str | None:
    """Why a unit of this kind cannot be routed in a layer, as what "it" does; None where it can."""
    if not isinstance(layer, nn.Module):  # dropped by PEFT or by hand
        return "is no module"
    has = kind == "block" or hasattr(layer, family_of(decoder).modules[kind])
    if kind != "mlp":
        why = _unroutable_attention(decoder, layer)
        if why is not None:
            return why
    if not has:
        return "has no MLP of its own"
    if kind == "block" and not family_of(decoder).blocks:
        return "works on several streams of hidden states at once"
    return _odd_arguments(part_of(decoder, layer, kind), kind) if is_found(decoder) else None


def _unroutable_attention(decoder: nn.Module, layer: nn.Module) -> str | None:
    attention = attention_of(decoder, layer)
    if attention is None:
        return f"has no attention ({type(layer).__name__} mixes its tokens in another way)"
    if getattr(attention, "is_kv_shared_layer", False):
        return "reads the keys of another layer"
    if getattr(attention, "store_full_length_kv", False):
        return "stores keys that other layers read"
    if getattr(getattr(decoder, "config", None), "alibi", False):
        return "tells positions by ALiBi, whose biases are not made for kept tokens"
    if not getattr(attention, "is_causal", True):
        return "attends to later tokens"
    index = decoder_layers(decoder).index(layer)
    if index not in plain_cache_layers(decoder):
        return "keeps more in the cache than keys and values, or nothing"
    return _odd_arguments(attention, "attn") if is_found(decoder) else None


def plain_cache_layers(decoder: nn.Module) -> set[int]:
    """The layers whose part of the model's cache is plainly keys and values."""
    layers = DynamicCache(config=decoder.config).layers  # type: ignore[arg-type]
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if not layers:  # one plain layer after the other, as they come
        return set(range(len(decoder_layers(decoder))))
    return {index for index, layer in enumerate(layers) if type(layer) in plain}


CACHES = ("cache", "past_key_values", "layer_past")
"""What attentions and layers call their cache; since transformers 5.24 most say the first."""


def cache_argument(module: nn.Module) -> str:
    """What a module's forward calls its cache."""
    names = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHES if name in names), CACHES[0])


ARGUMENTS = {
    *CACHES,
    *("attention_mask", "position_embeddings", "position_ids", "cache_position"),
    *("use_cache", "output_attentions"),
    # A decoder that reads one sequence gives none of these.
    *("encoder_hidden_states", "encoder_attention_mask", "key_value_states"),
}
"""Arguments of attentions and layers that can be given for some tokens only."""


def last_columns(number: int, device: torch.device) -> Tensor:
    """The `logits_to_keep` that asks a causal LM for the last columns only: (number,).

    A plain number would do, but it takes a slice, and to multiply a slice of several rows by the
    output embedding PyTorch copies that once a row, which on a CPU takes longer than the rest of
    the head.
    """
    return torch.arange(-number, 0, device=device)


def _odd_arguments(part: nn.Module, kind: str) -> str | None:
    """What in the signature of a unit nobody has tested leaves doubt; None if nothing does."""
    parameters = list(inspect.signature(type(part).forward).parameters.values())[2:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    odd = names if kind == "mlp" else [name for name in names if name not in ARGUMENTS]
    if odd:
        return (
            f"takes {odd[0]!r}, of which {type(part).__name__} may need more than the kept tokens'"
        )
    if kind != "mlp" and not any(name in CACHES for name in names):
        return f"takes no cache ({type(part).__name__})"
    return None

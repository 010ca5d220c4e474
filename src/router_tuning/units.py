"""Where attention and MLP sit in each model family. The only file that knows family names.

A *unit* is what one routing decision runs or skips: the attention or the MLP of one decoder layer.
To add a family, add a row to FAMILIES; CONTRIBUTING.md ("A new model family") has the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder layer, by the kind of unit."""

    modules: Mapping[str, str] = field(default_factory=lambda: {"attn": "self_attn", "mlp": "mlp"})
    post_norms: Mapping[str, str] = field(default_factory=dict)
    """The norms that a sandwich family puts on a unit's output before adding it to the residual."""


KINDS = ("attn", "mlp")
"""Kinds of units, in the order in which a decoder layer runs them."""

PRE_NORM = Family()
SANDWICH = Family(
    post_norms={"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
)

FAMILIES: dict[str, Family] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "gemma3_text": SANDWICH,
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
        UnsupportedModelError: no decoder of a known family is inside.
    """
    for module in unwrap(model).modules():
        if _model_type(module) in FAMILIES and isinstance(
            getattr(module, "layers", None), nn.ModuleList
        ):
            return module
    raise UnsupportedModelError(
        f"no unit table for model_type {_model_type(unwrap(model))!r}. Known: "
        f"{', '.join(sorted(FAMILIES))}. "
        f'Add a row to FAMILIES in units.py, see CONTRIBUTING "A new model family".'
    )


def family_of(decoder: nn.Module) -> Family:
    """The family of a module that `decoder_of` returned."""
    return FAMILIES[str(_model_type(decoder))]


def _model_type(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder layers that the model runs, in order."""
    model: Any = decoder
    layers: list[nn.Module] = list(model.layers)[: model.config.num_hidden_layers]
    return layers


def part_of(decoder: nn.Module, layer: nn.Module, kind: str) -> nn.Module:
    """The module of a decoder layer that a unit of this kind runs or skips."""
    part: nn.Module = getattr(layer, family_of(decoder).modules[kind])
    return part


def attention_of(decoder: nn.Module, layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    return part_of(decoder, layer, "attn")


def post_norm_of(decoder: nn.Module, layer: nn.Module, kind: str) -> nn.Module | None:
    """The norm between a unit and the residual, in sandwich families; else None."""
    name = family_of(decoder).post_norms.get(kind)
    return None if name is None else getattr(layer, name)


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
    for index in wanted:
        for kind in kinds_of(config):
            if not hasattr(layers[index], family_of(decoder).modules[kind]):
                what = {"attn": "attention", "mlp": "MLP"}[kind]
                raise UnsupportedModelError(
                    f"layer {index} ({type(layers[index]).__name__}) has no {what} to route; "
                    f"leave it out of `layers`"
                )
            yield Unit(f"layers.{index}.{kind}", kind, index)

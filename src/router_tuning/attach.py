"""Puts routed forwards in front of a model's units, and takes them off again.

`attach` adds a router beside each routed unit and replaces the bound `forward` of the decoder (the
door, where a forward's context is made), of each attention, and of the post-norms of sandwich
families. A causal LM's `generate` tells where the prompt ends, and its methods that batch
continuously are replaced by a refusal. No module is wrapped: base weight names stay, and `detach`
gives back the same objects without a trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from router_tuning.config import RoutingConfig, check_budget, threshold_for
from router_tuning.errors import ConfigError, UnsupportedModelError
from router_tuning.execution.attention import carry_context, routed_attention
from router_tuning.execution.block import routed_block
from router_tuning.execution.causal import (
    CONTINUOUS,
    PREPARE,
    accept_keywords,
    tell_prompt,
    unless_routed,
    with_the_padding,
)
from router_tuning.execution.context import Routing, routing_of
from router_tuning.execution.door import enter_decoder
from router_tuning.execution.handover import gate_post_norm
from router_tuning.execution.mlp import routed_mlp
from router_tuning.execution.projections import check_parts
from router_tuning.execution.trial import try_out
from router_tuning.prices import unit_prices
from router_tuning.routers import make_router
from router_tuning.units import (
    KINDS,
    Unit,
    attention_of,
    decoder_layers,
    decoder_of,
    family_of,
    find_units,
    hidden_size_of,
    input_norm_name,
    is_found,
    kinds_of,
    part_of,
    post_norm_of,
    router_child,
    unroutable,
    unwrap,
)

__all__ = ["attach", "detach", "install", "routing_of", "set_budget", "uninstall"]

STAND_INS: dict[str, Callable[..., Any]] = {
    "attn": routed_attention,
    "mlp": routed_mlp,
    "block": routed_block,
}
"""The routed forward of each kind of unit."""


def attach(model: nn.Module, config: RoutingConfig) -> None:
    """Add fresh routers to a causal LM and route it. The logits stay the same to the bit.

    Raises:
        ConfigError: the config is out of range, or the model is routed already.
        UnsupportedModelError: no unit table for this family, or an attention of unknown parts.
    """
    config.check()
    decoder = decoder_of(model)
    if "routing" in decoder.__dict__:
        raise ConfigError("this model is routed already; detach(model) first")
    layers = decoder_layers(decoder)
    for unit in _checked_units(model, config):
        layer = layers[unit.layer_idx]
        device = next(layer.parameters()).device
        router = make_router(config, hidden_size_of(model), device)
        layer.add_module(router_child(unit.kind), router)
    try:
        install(model, config)
    except UnsupportedModelError:
        detach(model)
        raise


def detach(model: nn.Module) -> None:
    """Remove the routers and every trace of routing."""
    uninstall(model)
    for layer in decoder_layers(decoder_of(model)):
        for kind in KINDS:
            if hasattr(layer, router_child(kind)):
                delattr(layer, router_child(kind))


def install(model: nn.Module, config: RoutingConfig) -> None:
    """Route a model whose layers have their routers (see router_child) already."""
    _keep_out_of_compiled_code()
    decoder = decoder_of(model)
    layers = decoder_layers(decoder)
    units = _checked_units(model, config)
    norms = tuple(input_norm_name(decoder, layer) for layer in layers)
    prices = unit_prices(decoder, config, units)
    num_units = len(layers) * len(kinds_of(config))
    decoder.__dict__["routing"] = Routing(config, units, num_units, norms, prices)
    for layer in layers:
        attention = attention_of(decoder, layer)
        if attention is not None:
            _replace(attention, "forward", carry_context)
    for unit in units:
        layer = layers[unit.layer_idx]
        part = part_of(decoder, layer, unit.kind)
        attention = attention_of(decoder, layer)
        post_norm = post_norm_of(decoder, layer, unit.kind)
        part.__dict__["skip_unit"] = unit
        _replace(part, "forward", STAND_INS[unit.kind])
        if post_norm is not None:
            post_norm.__dict__["skip_unit"] = unit
            _replace(post_norm, "forward", gate_post_norm)
        if unit.kind == "mlp" and attention is not None:
            attention.__dict__["skip_followed_by"] = unit.layer_idx
    _replace(decoder, "forward", enter_decoder)
    causal = unwrap(model)
    if causal is not decoder:
        causal_class: Any = type(causal)
        _replace(causal, "forward", accept_keywords(causal_class))
        if hasattr(causal_class, "generate"):
            _replace(causal, "generate", tell_prompt(causal_class))
        if hasattr(causal_class, PREPARE):
            _replace(causal, PREPARE, with_the_padding(causal_class))
        for name in CONTINUOUS:
            if hasattr(causal_class, name):
                _replace(causal, name, unless_routed(causal_class, name))
    if is_found(decoder):
        try:
            try_out(decoder)
        except UnsupportedModelError:
            uninstall(model)
            raise


def _checked_units(model: nn.Module, config: RoutingConfig) -> tuple[Unit, ...]:
    decoder = decoder_of(model)
    units = tuple(find_units(model, config))
    for unit in units:
        attention = attention_of(decoder, decoder_layers(decoder)[unit.layer_idx])
        if unit.kind != "mlp" and attention is not None and family_of(decoder).parts:
            check_parts(attention)
    return units


def uninstall(model: nn.Module) -> None:
    """Take the routed forwards off; the routers stay."""
    decoder, causal = decoder_of(model), unwrap(model)
    decoder.__dict__.pop("routing", None)
    modules = [decoder, causal]
    for layer in decoder_layers(decoder):
        for kind in KINDS:
            if unroutable(decoder, layer, kind) is None:
                parts = (part_of(decoder, layer, kind), post_norm_of(decoder, layer, kind))
                modules += [part for part in parts if part is not None]
        attention = attention_of(decoder, layer)
        modules += [] if attention is None else [attention]
    for module in modules:
        module.__dict__.pop("skip_unit", None)
        module.__dict__.pop("skip_followed_by", None)
        _restore(module, "forward")
    for name in ("generate", PREPARE, *CONTINUOUS):
        _restore(causal, name)


def set_budget(model: nn.Module, budget: float | Tensor | None) -> None:
    """Set the budget of calls that give none; None goes back to the routers' own threshold.

    A tensor must hold one number.

    Raises:
        BudgetError: not in (0, 1], not calibrated, or outside the calibrated range.
    """
    config = routing_of(model).config
    if isinstance(budget, Tensor) and budget.numel() == 1:
        budget = budget.item()
    if budget is not None:
        # As a plain float, which can be saved.
        budget = check_budget(budget)  # type: ignore[arg-type]
        threshold_for(config, budget)
    config.default_budget = budget


def _replace(module: nn.Module, name: str, method: Callable[..., Any]) -> None:
    if f"dense_{name}" not in module.__dict__:  # else installed before
        # An instance's own that was there before (an accelerate hook, say) is kept and called.
        module.__dict__[f"dense_{name}"] = module.__dict__.get(name)
    module.__dict__[name] = MethodType(method, module)


def _restore(module: nn.Module, name: str) -> None:
    if f"dense_{name}" not in module.__dict__:
        return
    before = module.__dict__.pop(f"dense_{name}")
    del module.__dict__[name]
    if before is not None:
        module.__dict__[name] = before


@functools.cache
def _keep_out_of_compiled_code() -> None:
    """Tell the compiler to run this package's functions as they are, and to compile the modules
    that they call: contexts, records and numbers of kept tokens are no part of a graph.
    """
    torch._dynamo.trace_rules.add("router_tuning")


def num_router_parameters(model: nn.Module) -> int:
    """Trainable numbers in the routers."""
    layers = decoder_layers(decoder_of(model))
    children = [getattr(layer, router_child(kind), None) for layer in layers for kind in KINDS]
    return sum(p.numel() for child in children if child is not None for p in child.parameters())

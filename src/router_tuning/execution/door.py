"""The door: the forward that stands before a decoder's. It makes the context of a forward, picks
the path, and refuses calls that routing cannot serve.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from router_tuning.config import RoutingConfig, threshold_for
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.cache import check_cache
from router_tuning.execution.context import (
    CONTEXT_KEY,
    CallOptions,
    ForwardContext,
    Path,
    Routing,
    default_path,
    open_forward,
    options_for,
    original_forward,
    routing_of,
)
from router_tuning.execution.experts import MASK, gives_logits_of_what_ran, keep_what_ran
from router_tuning.execution.handover import Sent, opened
from router_tuning.execution.prompts import NO_CACHE, pools_everything, prompt_of
from router_tuning.units import cache_argument, decoder_layers, family_of

KEYWORDS = ("budget", "prompt_lengths")
"""What a call of a routed model may say beside the model's own arguments."""


def enter_decoder(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The door: make the context of this forward and send it along."""
    dense_forward = original_forward(decoder)
    routing = routing_of(decoder)
    options = options_for(decoder)
    ours = {**options.keywords, **taken_out(kwargs)}
    if options.dense or not routing.enabled:
        with opened(None):
            return dense_forward(*args, **kwargs)
    if MASK in ours:
        kwargs[MASK] = ours[MASK]
    given = bind(type(decoder), args, kwargs)
    if given.get("input_ids") is None and given.get("inputs_embeds") is None:
        return dense_forward(*args, **kwargs)  # raises transformers' own error
    _check_outputs(decoder, given)
    path = _path(decoder, routing, options, given)
    if path == "masked":
        kwargs = _without_cache(given, kwargs)
    elif _fills_a_cache(decoder, given):
        layers = routing.cached_layers(len(decoder_layers(decoder)))
        check_cache(_cache_in(given), layers, routing.adapter)
        if _cache_in(given) is None and routing.remembers_for_mlps():
            # The decoder would make one that MLPs are not called with.
            made = DynamicCache(config=decoder.config)  # type: ignore[arg-type]
            given = {**given, cache_argument(decoder): made}
            args, kwargs = (), dict(given)
    context = _context_of(decoder, routing, options, given, ours, path)
    if "logits_to_keep" in _positional_names(type(decoder), "forward"):  # type: ignore[arg-type]
        # Some decoders run their last layers on the tokens that logits are wanted of, and no
        # others; a unit needs to see all. The causal LM picks the tokens again.
        kwargs["logits_to_keep"] = 0
    if family_of(decoder).keywords:
        kwargs[CONTEXT_KEY] = Sent(context)
    elif context.masked and _checkpoints_activations(decoder):
        raise UnsupportedCallError(
            f"activation checkpointing runs layers of {type(decoder).__name__} again without what "
            "their units decided; switch it off to train routers on this family"
        )
    with opened(context):
        run = dense_forward if context.masked else functools.partial(_uncompiled, dense_forward)
        output = run(*args, **kwargs)
    if gives_logits_of_what_ran(decoder, given):
        keep_what_ran(output, context)
    # Appended when it is complete: an interrupted forward leaves no half record.
    if options.trace is not None:
        options.trace.forwards.append(context.record)
    return output


def _path(
    decoder: nn.Module, routing: Routing, options: CallOptions, given: dict[str, Any]
) -> Path:
    """The path of a forward: as told, or as gradients are wanted."""
    if options.decider is not None or not pools_everything(routing.config):
        return options.path or default_path(decoder, routing)
    if _cache_in(given) is not None or given.get("use_cache") or options.path == "skipping":
        raise UnsupportedCallError(NO_CACHE)
    return "masked"  # the skipping one leaves out the padding, which decides with the rest


def _check_outputs(decoder: nn.Module, given: dict[str, Any]) -> None:
    if given.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise UnsupportedCallError(
            "attention weights are not made where tokens are skipped; ask for output_attentions "
            "with the routers off, inside `with dense(model):`"
        )


def _context_of(
    decoder: nn.Module,
    routing: Routing,
    options: CallOptions,
    given: dict[str, Any],
    ours: dict[str, Any],
    path: Path,
) -> ForwardContext:
    """The context of a forward with these arguments, the decoder's and our own."""
    inputs = given.get("input_ids")
    filled = path != "masked" and _fills_a_cache(decoder, given)
    position_ids = given.get("position_ids")
    context = open_forward(
        decoder,
        routing,
        options,
        given["inputs_embeds"] if inputs is None else inputs,
        given.get("attention_mask"),
        _cache_in(given) if filled else None,
        None if filled else position_ids,  # no texts are packed where a cache is filled
        _thresholds(routing.config, ours.get("budget")),
        path,
    )
    lengths = ours.get("prompt_lengths")
    context.is_read |= gives_logits_of_what_ran(decoder, given)
    context.prompt_BT = prompt_of(context, routing, options.prompt_end, lengths, position_ids)
    return context


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward as it is also inside compiled code: what is skipped changes every shape."""
    return forward(*args, **kwargs)


def _checkpoints_activations(decoder: nn.Module) -> bool:
    layers = decoder_layers(decoder)
    own = any(getattr(module, "gradient_checkpointing", False) for module in [decoder, *layers])
    return own and decoder.training


def _cache_in(given: dict[str, Any]) -> Any:
    """The cache among a call's arguments: `cache` since transformers 5.24, `past_key_values`
    before.
    """
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def _fills_a_cache(decoder: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a forward writes keys into a cache, its own or a new one."""
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", False)
    return _cache_in(given) is not None or bool(use_cache)


def _without_cache(given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The differentiable path computes every token's keys, so what it would leave in a cache is not
    ours.
    """
    if _cache_in(given) is not None:
        raise UnsupportedCallError(
            "the differentiable path takes no cache; decode under torch.no_grad(), or pass "
            "use_cache=False and "
            "the whole sequence at once"
        )
    return {**kwargs, "use_cache": False}


def _thresholds(config: RoutingConfig, budget: Any) -> list[float]:
    if hasattr(budget, "tolist"):  # a tensor or an array
        budget = budget.tolist()
    of_rows = isinstance(budget, Iterable) and not isinstance(budget, str)
    return [threshold_for(config, b) for b in (budget if of_rows else [budget])]


def taken_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our keywords among a call's, without those left at None."""
    ours = {name: kwargs.pop(name) for name in KEYWORDS if name in kwargs}
    return {name: value for name, value in ours.items() if value is not None}


@functools.cache
def _positional_names(module_class: type, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(module_class, method)).parameters)[1:]


def bind(
    module_class: type, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
) -> dict[str, Any]:
    return {**dict(zip(_positional_names(module_class, method), args, strict=False)), **kwargs}

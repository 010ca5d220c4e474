"""Puts routed forwards in front of a model's units, and takes them off again.

`attach` adds a router beside each routed unit and replaces the bound `forward` of the decoder (the
door, where a forward's context is made), of each attention, and of the post-norms of sandwich
families. A causal LM's `generate` tells where the prompt ends, and its methods that batch
continuously are replaced by a refusal. No module is wrapped: base weight names stay, and `detach`
gives back the same objects without a trace.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import DynamicCache

from router_tuning.config import RoutingConfig, check_budget, threshold_for
from router_tuning.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from router_tuning.execution.attention import carry_context, routed_attention
from router_tuning.execution.block import routed_block
from router_tuning.execution.cache import check_cache
from router_tuning.execution.context import (
    CONTEXT_KEY,
    CallOptions,
    ForwardContext,
    Path,
    Routing,
    called_with,
    default_path,
    open_forward,
    options_for,
    original_forward,
    original_method,
    prompts_until,
    routing_of,
)
from router_tuning.execution.handover import gate_post_norm, opened
from router_tuning.execution.mlp import routed_mlp
from router_tuning.execution.projections import check_parts
from router_tuning.execution.prompts import asks_for_prompts, label_starts, prompt_of
from router_tuning.execution.trial import try_out
from router_tuning.routers import make_router
from router_tuning.units import (
    KINDS,
    Unit,
    attention_of,
    cache_argument,
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

CONTINUOUS = (
    "generate_batch",
    "continuous_batching_context_manager",
    "init_continuous_batching",
)
"""A causal LM's ways into continuous batching; not every version of transformers has them all."""


KEYWORDS = ("budget", "prompt_lengths")
"""What a call of a routed model may say beside the model's own arguments."""
PREPARE = "prepare_inputs_for_generation"
"""The method of a causal LM that makes the arguments of `generate`'s forwards."""


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
    decoder.__dict__["routing"] = Routing(config, units, len(layers) * len(kinds_of(config)), norms)
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
    _replace(decoder, "forward", _enter_decoder)
    causal = unwrap(model)
    if causal is not decoder:
        causal_class: Any = type(causal)
        _replace(causal, "forward", _accept_keywords(causal_class))
        if hasattr(causal_class, "generate"):
            _replace(causal, "generate", _tell_prompt(causal_class))
        if hasattr(causal_class, PREPARE):
            _replace(causal, PREPARE, _with_the_padding(causal_class))
        for name in CONTINUOUS:
            if hasattr(causal_class, name):
                _replace(causal, name, _unless_routed(causal_class, name))
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


def _enter_decoder(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The door: make the context of this forward and send it along."""
    dense_forward = original_forward(decoder)
    routing = routing_of(decoder)
    options = options_for(decoder)
    ours = {**options.keywords, **_taken_out(kwargs)}
    if options.dense or not routing.enabled:
        with opened(None):
            return dense_forward(*args, **kwargs)
    given = _bind(type(decoder), args, kwargs)
    if given.get("input_ids") is None and given.get("inputs_embeds") is None:
        return dense_forward(*args, **kwargs)  # raises transformers' own error
    _check_outputs(decoder, given)
    path = options.path or default_path(decoder, routing)
    if path == "masked":
        kwargs = _without_cache(given, kwargs)
    elif _fills_a_cache(decoder, given):
        check_cache(_cache_in(given), routing.cached_layers(len(decoder_layers(decoder))))
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
        kwargs[CONTEXT_KEY] = context
    elif context.masked and _checkpoints_activations(decoder):
        raise UnsupportedCallError(
            f"activation checkpointing runs layers of {type(decoder).__name__} again without what "
            "their units decided; switch it off to train routers on this family"
        )
    with opened(context):
        run = dense_forward if context.masked else functools.partial(_uncompiled, dense_forward)
        output = run(*args, **kwargs)
    # Appended when it is complete: an interrupted forward leaves no half record.
    if options.trace is not None:
        options.trace.forwards.append(context.record)
    return output


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
    context.prompt_BT = prompt_of(context, routing, options.prompt_end, lengths, position_ids)
    return context


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward as it is also inside compiled code: what is skipped changes every shape."""
    return forward(*args, **kwargs)


@functools.cache
def _keep_out_of_compiled_code() -> None:
    """Tell the compiler to run this package's functions as they are, and to compile the modules
    that they call: contexts, records and numbers of kept tokens are no part of a graph.
    """
    torch._dynamo.trace_rules.add("router_tuning")


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


def _taken_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our keywords among a call's, without those left at None."""
    ours = {name: kwargs.pop(name) for name in KEYWORDS if name in kwargs}
    return {name: value for name, value in ours.items() if value is not None}


@functools.cache
def _positional_names(module_class: type, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(module_class, method)).parameters)[1:]


def _bind(
    module_class: type, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
) -> dict[str, Any]:
    return {**dict(zip(_positional_names(module_class, method), args, strict=False)), **kwargs}


@functools.cache
def _accept_keywords(causal_class: type) -> Callable[..., Any]:
    """A causal LM's forward that also lists KEYWORDS, which `generate` looks for in the signature.
    Labels tell it where prompts end.
    """

    def forward(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            ours = _taken_out(kwargs)
            if ours:
                stack.enter_context(called_with(causal, ours))
            labels = _bind(causal_class, args, kwargs).get("labels")
            if labels is not None and asks_for_prompts(causal):
                stack.enter_context(prompts_until(causal, label_starts(labels)))
            return original_forward(causal)(*args, **kwargs)

    dense = causal_class.forward  # type: ignore[attr-defined]
    functools.update_wrapper(forward, dense)
    signature = inspect.signature(dense)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in KEYWORDS
    ]
    *named, last = signature.parameters.values()
    ordered = [*named, *ours, last] if last.kind is last.VAR_KEYWORD else [*named, last, *ours]
    forward.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    return forward


@functools.cache
def _tell_prompt(causal_class: type) -> Callable[..., Any]:
    """A causal LM's generate that tells the forwards inside where the prompt ends: at its input's
    end. Assisted decoding's first forward goes on behind it, and without a cache all do.
    """

    def generate(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dense_generate = original_method(causal, "generate")
        if not asks_for_prompts(causal):
            return dense_generate(*args, **kwargs)
        given = _bind(causal_class, args, kwargs, "generate")
        _check_prompt_is_whole(causal, given)
        with prompts_until(causal, _prompt_width(given)):
            return dense_generate(*args, **kwargs)

    return functools.update_wrapper(generate, causal_class.generate)  # type: ignore[attr-defined]


def _prompt_width(given: dict[str, Any]) -> int:
    """Columns of a generation's input; without one it begins with a bos token."""
    inputs = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    return next((x.shape[1] for x in inputs if isinstance(x, Tensor) and x.ndim > 1), 1)


def _check_prompt_is_whole(causal: Any, given: dict[str, Any]) -> None:
    """Refuse what makes of the first forward over an empty cache less, or other, than the
    prompt.
    """
    configs = (given.get("generation_config"), getattr(causal, "generation_config", None))
    for name, neutral, why in (
        ("prefill_chunk_size", (None,), "cuts the prompt into chunks (chunked prefill)"),
        ("guidance_scale", (None, 1), "runs a second prompt beside the first"),
    ):
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        value = next((v for v in values if v is not None), None)
        if value not in neutral:
            raise UnsupportedCallError(
                f'{name}={value} {why}, but with pooling="prompt" one prompt decides, as a whole; '
                f'leave {name} unset, or use an adapter with pooling="prefix"'
            )


@functools.cache
def _with_the_padding(causal_class: type) -> Callable[..., Any]:
    """The preparation of `generate`'s forwards, which leaves the padding mask as it came: for
    static caches it is made a 4-D one, which does not tell where the padding is.
    """

    def prepare(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = original_method(causal, PREPARE)(*args, **kwargs)
        decoder = decoder_of(causal)
        routing = decoder.__dict__.get("routing")
        mask = kwargs.get("attention_mask")
        if routing is None or not routing.enabled or options_for(decoder).dense:
            return inputs
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            inputs["attention_mask"] = mask
        return inputs

    return functools.update_wrapper(prepare, getattr(causal_class, PREPARE))


@functools.cache
def _unless_routed(causal_class: type, name: str) -> Callable[..., Any]:
    """A way into continuous batching that is open only while the routers are off.

    transformers runs its forwards in a thread that swallows the door's errors, and answers nothing.
    """

    def method(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if routing_of(causal).enabled:
            raise UnsupportedCallError(
                f"{name} keeps keys in pages, which routing cannot serve; use generate() with a "
                f"left-padded batch. With the routers off for as long as it runs it works: inside "
                f"`with model.disable_adapter():` of a PEFT model, or after "
                f"routing_of(model).enabled = False (its thread does not see `with dense(model):`)"
            )
        return original_method(causal, name)(*args, **kwargs)

    return functools.update_wrapper(method, getattr(causal_class, name))


def num_router_parameters(model: nn.Module) -> int:
    """Trainable numbers in the routers."""
    layers = decoder_layers(decoder_of(model))
    children = [getattr(layer, router_child(kind), None) for layer in layers for kind in KINDS]
    return sum(p.numel() for child in children if child is not None for p in child.parameters())

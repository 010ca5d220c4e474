"""What a decoder layer costs, by a token, by a key and by a pair of both: FLOPs, and a key's bytes.

Which linear layers run before an attention hands its keys to the cache, which after, and how wide
these keys are, stands in no common place. So it is watched: a copy of the decoder without weights
(on the device "meta", where nothing is computed) runs three tokens and then two more over a cache.
What the linear layers cost is then read off the real model's. Where the copy does not run there is
an error, never a guess.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from router_tuning.errors import UnsupportedModelError
from router_tuning.execution.context import left_out_when_dense
from router_tuning.units import (
    CACHES,
    KINDS,
    Family,
    attention_of,
    decoder_layers,
    family_of,
    router_child,
)

PAST, NEW = 3, 2
"""Tokens of the two forwards of the copy."""
KEY_PARTS = ("k_proj", "v_proj")
"""What makes the keys in an attention of known parts (execution/projections.py)."""
TOP_K = ("top_k", "num_experts_per_tok", "moe_k", "top_k_experts", "num_selected_experts")
"""What the number of experts that a token goes through is called."""


@dataclass(frozen=True)
class LayerCost:
    """FLOPs in a decoder layer, and bytes."""

    key: int
    """Of a token whose key is made, in the attention."""
    query: int
    """Of a token that attends, beside its key."""
    expand: int
    """Of a key that is attended to, where the cache holds a short form of it."""
    pair: int
    """Of a query and a key that it sees."""
    mlp: int
    """Of a token in the MLP."""
    rest: int
    """Of a token in what is in neither."""
    early: int
    """Of `mlp` and `rest`, what a block has to run to make a key."""
    key_bytes: int
    """Of a key and its value in the cache."""


@dataclass
class Watched:
    """What the copy showed of a layer."""

    before: list[str] = field(default_factory=list)
    """Linear layers that ran before the keys were handed over."""
    expanding: list[str] = field(default_factory=list)
    """Linear layers that ran on all keys, not on the new tokens."""
    pair: int = 0
    keys: int = PAST + NEW
    """How many keys were attended to."""
    key_bytes: int = 0
    handed: bool = False


def layer_costs(decoder: nn.Module, *, dense: bool = False) -> list[LayerCost]:
    """The costs of each decoder layer, in order; with `dense`, without LoRA of the routers'
    adapter, which is off in a dense forward. Any other LoRA counts in both.

    Raises:
        UnsupportedModelError: a copy of the decoder without weights does not run, or it is not
            known how many experts a token goes through.
    """
    watched = watch(decoder)
    return [
        _layer_cost(decoder, layer, seen, dense)
        for layer, seen in zip(decoder_layers(decoder), watched, strict=True)
    ]


def _layer_cost(decoder: nn.Module, layer: nn.Module, seen: Watched, dense: bool) -> LayerCost:
    family, config = family_of(decoder), decoder.config
    attention, mlp = (family.modules[kind] for kind in ("attn", "mlp"))
    inside = f"{attention}."

    def flops(names: list[str]) -> int:
        return sum(linear_flops(layer.get_submodule(name), config, dense=dense) for name in names)

    total = flops([name for name, _ in layer.named_children() if name not in _routers()])
    of_mlp = flops([mlp] if hasattr(layer, mlp) else [])
    of_attention = flops([attention] if hasattr(layer, attention) else [])
    expand = flops(seen.expanding)
    before = [inside + part for part in KEY_PARTS] if family.parts else seen.before
    key = flops([name for name in before if name.startswith(inside)])
    return LayerCost(
        key=key,
        query=of_attention - key - expand,
        expand=expand,
        pair=seen.pair,
        mlp=of_mlp,
        rest=total - of_attention - of_mlp,
        early=flops([name for name in before if not name.startswith(inside)]),
        key_bytes=seen.key_bytes,
    )


def _routers() -> tuple[str, ...]:
    return tuple(router_child(kind) for kind in KINDS)


def linear_flops(module: nn.Module, config: Any, *, dense: bool = False) -> int:
    """FLOPs a token of all linear layers in a module. Of experts, those that a token goes
    through; `dense` as in layer_costs.
    """
    if left_out_when_dense(module):
        parts = [module.get_submodule("base_layer"), *([] if dense else active_parts(module))]
        return sum(linear_flops(part, config, dense=dense) for part in parts)
    inner = 0
    for name, child in module.named_children():
        flops = linear_flops(child, config, dense=dense)
        if isinstance(child, nn.ModuleList) and "experts" in name and flops:
            flops = flops * experts_of_a_token(module, config) // len(child)
        inner += flops
    return inner + _own_flops(module, config, leaf=not inner)


def active_parts(layer: Any) -> list[nn.Module]:
    """What an adapter's layer (left_out_when_dense) runs beside the base model's, of the adapters
    that are active.
    """
    by_adapter = [child for child in layer.children() if isinstance(child, nn.ModuleDict)]
    active: list[str] = layer.active_adapters
    return [parts[name] for parts in by_adapter for name in active if name in parts]


def _own_flops(module: nn.Module, config: Any, leaf: bool) -> int:
    """FLOPs a token of a module's own weights."""
    if isinstance(module, (nn.Embedding, nn.Conv1d)):
        return 0
    if isinstance(module, Conv1D):
        return 2 * module.weight.numel()
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if leaf and None not in sizes:  # of any make: packed weights do not show their size
        return 2 * int(sizes[0]) * int(sizes[1])  # type: ignore[arg-type]
    own = dict(module.named_parameters(recurse=False))
    experts = [weight for weight in own.values() if weight.ndim == 3]
    if experts:
        through = experts_of_a_token(module, config)
        return sum(2 * weight.numel() * through // weight.shape[0] for weight in experts)
    weight = own.get("weight")
    return 2 * weight.numel() if leaf and weight is not None and weight.ndim == 2 else 0


def experts_of_a_token(experts: nn.Module, config: Any) -> int:
    """How many experts a token goes through, as a module that holds them or the config says.

    Raises:
        UnsupportedModelError: neither does.
    """
    for source in (experts, config):
        for name in TOP_K:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    raise UnsupportedModelError(
        f"it is not known how many experts of {type(experts).__name__} a token goes through, so "
        f"its FLOPs cannot be counted; wanted one of {', '.join(TOP_K)} in the model's config"
    )


def watch(decoder: nn.Module) -> list[Watched]:
    """What a copy of the decoder without weights shows of each layer."""
    config: Any = decoder.config
    dtype = next(p.dtype for p in decoder.parameters() if p.is_floating_point())
    described = config.to_json_string(use_diff=False)
    return list(_watched(_Plan(type(decoder), described, dtype, config)))


@dataclass(frozen=True)
class _Plan:
    """What a copy is built from; equal plans show the same."""

    decoder_class: type
    described: str
    dtype: torch.dtype
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=32)
def _watched(plan: _Plan) -> tuple[Watched, ...]:
    try:
        with torch.device("meta"), torch.no_grad():
            return tuple(_run_copy(plan))
    except Exception as error:
        raise UnsupportedModelError(
            f"the FLOPs of {plan.decoder_class.__name__} cannot be counted: a copy of it without "
            f"weights, which shows how its attentions are built, does not run "
            f"({type(error).__name__}: {error})"
        ) from error


def _run_copy(plan: _Plan) -> list[Watched]:
    config = deepcopy(plan.config)
    config._attn_implementation = "eager"  # whose products of matrices are counted
    config.pad_token_id = None  # else transformers looks for padding, in values
    copy = plan.decoder_class(config).to(plan.dtype).eval()
    family = family_of(copy)
    layers = decoder_layers(copy)
    for layer in layers:
        _leave_mlp_out(layer, family)
    cache = _WatchedCache(config, len(layers))
    name = next(name for name in CACHES if name in _arguments(plan.decoder_class))
    with cache.products:
        for tokens in (PAST, NEW):
            cache.layers_seen = [Watched() for _ in layers]
            hooks = [h for i, layer in enumerate(layers) for h in cache.hooks(i, layer, copy)]
            ids = torch.zeros((1, tokens), dtype=torch.long)
            copy(input_ids=ids, use_cache=True, **{name: cache})
            for hook in hooks:
                hook.remove()
    return cache.layers_seen


def _arguments(decoder_class: Any) -> tuple[str, ...]:
    code = decoder_class.forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return tuple(code.__code__.co_varnames)


def _leave_mlp_out(layer: nn.Module, family: Family) -> None:
    """Experts are chosen by value, and the copy has none."""
    mlp = getattr(layer, family.modules["mlp"], None)
    if mlp is not None:

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (x, None) if family.mlp_tuple else x

        mlp.forward = forward


class _Products(TorchDispatchMode):
    """Counts the FLOPs of products of two matrices by pairs, as attentions multiply."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


class _WatchedCache(DynamicCache):
    """A cache that notes what each layer has done when it hands its keys over."""

    def __init__(self, config: Any, num_layers: int) -> None:
        super().__init__(config=config)
        self.products = _Products()
        self.layers_seen = [Watched() for _ in range(num_layers)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        seen = self.layers_seen[layer_idx]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        seen.handed, seen.keys = True, keys.shape[-2]
        seen.key_bytes = sum(x[:, :, :1].nbytes for x in (key_states, value_states))
        return keys, values

    def hooks(self, index: int, layer: nn.Module, decoder: nn.Module) -> list[Any]:
        """Watch a layer's linear layers, MLP and attention."""
        seen, family = self.layers_seen[index], family_of(decoder)
        mlp = getattr(layer, family.modules["mlp"], None)
        attention = attention_of(decoder, layer)

        def ran(name: str) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                rows = args[0][..., 0].numel()
                if not seen.handed:
                    seen.before.append(name)
                elif rows == seen.keys != NEW:
                    seen.expanding.append(name)

            return note

        found = []
        for name, module in layer.named_modules():
            if module is mlp or (
                not list(module.children()) and _own_flops(module, decoder.config, True)
            ):
                found.append(module.register_forward_pre_hook(ran(name)))
        if attention is not None:
            found += self._watch_products(attention, seen)
        return found

    def _watch_products(self, attention: nn.Module, seen: Watched) -> list[Any]:
        def enter(*args: Any) -> None:
            seen.pair = -self.products.flops

        def leave(*args: Any) -> None:
            seen.pair = (seen.pair + self.products.flops) // (NEW * seen.keys)

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave),
        ]

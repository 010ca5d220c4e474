"""Bytes of the weights that a trace's forwards read: those of a part once in each forward in which
any token runs it. Decoding few rows is bound by them.

Of experts, no more are counted than tokens can choose: one token's number of them for each token,
and never more than there are. Of an input embedding only rows are read, which are left out; the
output head is read whole, by every forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from router_tuning.execution.context import left_out_when_dense
from router_tuning.layer_cost import (
    KEY_PARTS,
    Watched,
    active_parts,
    experts_of_a_token,
    watch,
)
from router_tuning.record import ForwardRecord, Trace
from router_tuning.units import (
    KINDS,
    attention_of,
    decoder_layers,
    decoder_of,
    family_of,
    input_norm_name,
    part_of,
    router_child,
    unwrap,
)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes read by a trace's forwards, and by the dense model's over the same tokens."""

    read: int
    dense: int


@dataclass(frozen=True)
class Part:
    """Weights that are read together."""

    fixed: int
    experts: int = 0
    """Bytes of all experts."""
    number: int = 1
    """How many experts there are."""
    chosen: int = 1
    """How many a token goes through."""

    def read(self, tokens: int) -> int:
        """Bytes that a forward reads in which so many tokens run the part."""
        if not tokens:
            return 0
        return self.fixed + self.experts * min(tokens * self.chosen, self.number) // self.number


@dataclass(frozen=True)
class LayerWeights:
    """What is read of a decoder layer: to make keys, to attend, in the MLP, and beside these. The
    first norm is read for the routers too.
    """

    key: Part
    query: Part
    mlp: Part
    norm: Part
    rest: Part
    routers: dict[str, Part]

    def whole(self, forward: ForwardRecord) -> int:
        """Bytes that a forward reads where nothing is skipped, without the routers'."""
        tokens = int(forward.real_BT.sum())
        parts = (self.key, self.query, self.mlp, self.norm, self.rest)
        return sum(part.read(tokens) for part in parts)

    def read(self, forward: ForwardRecord, units: dict[str, str]) -> int:
        """Bytes that a forward reads; `units` names the routed ones."""
        tokens = int(forward.real_BT.sum())

        def kept(*kinds: str) -> int:
            routed = [units[kind] for kind in kinds if units.get(kind) in forward.units]
            return min([tokens, *(int(forward.units[name].ran_BT.sum()) for name in routed)])

        attending = units.get("attn", units.get("block"))
        written = tokens
        if attending in forward.units:
            write_BT = forward.units[attending].write_BT
            assert write_BT is not None, f"{attending} has no keys"
            written = int(write_BT.sum())
        ran = [
            (self.key, written),
            (self.query, kept("attn", "block")),
            (self.mlp, kept("mlp", "block")),
            (self.norm, tokens),
            (self.rest, kept("block")),
            *((self.routers[kind], tokens) for kind in units),
        ]
        return sum(part.read(number) for part, number in ran)


def weight_bytes(model: nn.Module, trace: Trace) -> WeightBytes:
    """Add up a trace.

    Raises:
        UnsupportedModelError: how the model's attentions are built cannot be seen (layer_cost.py).
    """
    decoder = decoder_of(model)
    causal: Any = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    outside = 0 if head is None else _bytes(head)
    read = dense = len(trace.forwards) * outside
    both = zip(layer_weights(decoder), layer_weights(decoder, dense=True), strict=True)
    for index, (weights, dense_weights) in enumerate(both):
        names = {kind: f"layers.{index}.{kind}" for kind in KINDS}
        units = {kind: name for kind, name in names.items() if name in trace.unit_names}
        for forward in trace.forwards:
            read += weights.read(forward, units)
            dense += dense_weights.whole(forward)
    return WeightBytes(read, dense)


def layer_weights(decoder: nn.Module, *, dense: bool = False) -> list[LayerWeights]:
    """What is read of each decoder layer, in order; `dense` as in layer_costs."""
    both = zip(decoder_layers(decoder), watch(decoder), strict=True)
    return [_of_layer(decoder, layer, seen, dense) for layer, seen in both]


def _of_layer(decoder: nn.Module, layer: nn.Module, seen: Watched, dense: bool) -> LayerWeights:
    family, attention = family_of(decoder), attention_of(decoder, layer)
    inside = f"{family.modules['attn']}."
    before = [inside + part for part in KEY_PARTS] if family.parts else seen.before
    key = sum(_bytes(layer.get_submodule(n), dense) for n in before if n.startswith(inside))
    beside = {kind: getattr(layer, router_child(kind), None) for kind in KINDS}
    routers = {kind: Part(_bytes(router)) for kind, router in beside.items() if router is not None}
    mlp_module = part_of(decoder, layer, "mlp") if hasattr(layer, family.modules["mlp"]) else None
    mlp = Part(0) if mlp_module is None else _of_mlp(mlp_module, decoder.config, dense)
    attending = 0 if attention is None else _bytes(attention, dense)
    norm_name = input_norm_name(decoder, layer)
    norm = 0 if norm_name is None else _bytes(getattr(layer, norm_name))
    rest = _bytes(layer, dense) - attending - mlp.fixed - mlp.experts - norm
    rest -= sum(router.fixed for router in routers.values())
    return LayerWeights(Part(key), Part(attending - key), mlp, Part(norm), Part(rest), routers)


def _of_mlp(mlp: nn.Module, config: Any, dense: bool) -> Part:
    found = list(_experts(mlp))
    if not found:
        return Part(_bytes(mlp, dense))
    experts = sum(size for _, size, _ in found)
    module, _, number = found[0]
    chosen = experts_of_a_token(module, config)
    return Part(_bytes(mlp, dense) - experts, experts, number, chosen)


def _experts(mlp: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    """Where experts are: the module that knows of them, their bytes, and how many they are."""
    for module in mlp.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and "experts" in name:
                yield module, _bytes(child), len(child)
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:
                yield module, weight.nbytes, weight.shape[0]


def _bytes(module: nn.Module, dense: bool = False) -> int:
    return sum(w.nbytes for w in module.parameters()) - _unread(module, dense)


def _unread(module: nn.Module, dense: bool) -> int:
    """Bytes of the adapters' layers (left_out_when_dense) that no forward reads: of adapters that
    are not active, and of all of them in a dense one.
    """
    total = 0
    for layer in (m for m in module.modules() if left_out_when_dense(m)):
        read = [] if dense else active_parts(layer)
        total += sum(w.nbytes for w in layer.parameters())
        total -= sum(_bytes(part) for part in [layer.get_submodule("base_layer"), *read])
    return total

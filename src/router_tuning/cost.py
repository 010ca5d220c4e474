"""FLOPs, bytes of weights and bytes of the cache of what a trace ran. Counts, no clock.

A multiply and an add are two FLOPs. Counted are the linear layers, the routers, the attention's
scores and weighted sums (over the visible pairs of query and key only, and where an attention
ran whole over the dense call's) and the output head; norms,
rotations and activations are left out, in the routed and the dense model alike. Of experts, those
are counted that a token goes through. Where a cache holds keys in a short form (latent attention),
making the long one counts for each key left in the cache and each new one, in each forward. LoRA of
the routers' adapter counts in the routed model alone: the dense model has none. LoRA of another
adapter counts in both.

Not counted is what only fills: pads that the dense call itself computes; where rows hold different
numbers of keys, the ends of the shorter rows; of a window of latent keys, the places of tokens that
were kept (at most kv_window - 1 a row and forward). The recurrent states of layers without
attention are left out too. A trace of the differentiable path, which computes every token, costs
what the skipping path would.

Shapes: B batch, C columns (tokens, pads included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import routing_of
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.layer_cost import LayerCost, layer_costs
from router_tuning.record import ForwardRecord, Trace
from router_tuning.units import (
    KINDS,
    attention_of,
    decoder_layers,
    decoder_of,
    router_child,
    unwrap,
)
from router_tuning.weight_bytes import weight_bytes


@dataclass(frozen=True)
class Cost:
    """What a trace cost, beside what the dense model would have cost on the same tokens."""

    flops: float
    dense_flops: float
    kv_bytes: int
    """Bytes of the keys and values that the policy holds at the end."""
    dense_kv_bytes: int
    weight_bytes: int = 0
    """Bytes of weights that were read, over all forwards."""
    dense_weight_bytes: int = 0
    tokens: int = 0
    """Real tokens that ran; what to divide by for a cost a token."""

    @property
    def flops_fraction(self) -> float:
        """Routed over dense FLOPs."""
        return self.flops / self.dense_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def flops_fraction(model: nn.Module, trace: Trace) -> float:
    """Routed FLOPs over dense FLOPs, decoder and head together, for what the trace ran."""
    return cost(model, trace).flops_fraction


def cost(model: nn.Module, trace: Trace) -> Cost:
    """Add up a trace. Consecutive forwards over one cache are taken together, also where it was
    cropped between them. Beam search reorders rows unseen: there, what a query sees is that of its
    row's own past.

    Raises:
        UnsupportedCallError: the trace begins in the middle of a conversation, or is empty.
        UnsupportedModelError: how the model's attentions are built cannot be seen (layer_cost.py).
    """
    if not trace.forwards or trace.forwards[0].start:
        raise UnsupportedCallError(
            "the cost needs to know what was kept from the first token on, but this trace "
            + (
                f"begins at token {trace.forwards[0].start}; record the whole conversation"
                if trace.forwards
                else "is empty; run the model inside `with record(model) as trace:`"
            )
        )
    decoder = decoder_of(model)
    config = routing_of(model).config
    tokens = sum(int(f.real_BT.sum()) for f in trace.forwards)
    fixed, weights = tokens * _head_flops(model), weight_bytes(model, trace)
    total = Cost(fixed, fixed, 0, 0, weights.read, weights.dense, tokens)
    prices, dense_prices = layer_costs(decoder), layer_costs(decoder, dense=True)
    for index, layer in enumerate(decoder_layers(decoder)):
        units = {kind: f"layers.{index}.{kind}" for kind in KINDS}
        routed = {kind: name for kind, name in units.items() if name in trace.unit_names}
        attending = routed.get("attn", routed.get("block"))
        price, dense_price = prices[index], dense_prices[index]
        total += _token_cost(layer, price, dense_price, routed, trace, tokens)
        attention = attention_of(decoder, layer)
        sliding = None if attention is None else sliding_window_of(attention)
        for episode in _episodes(trace.forwards):
            total += _key_cost(price, dense_price, sliding, episode, attending, config)
    return total


def _token_cost(
    layer: nn.Module,
    price: LayerCost,
    dense_price: LayerCost,
    routed: dict[str, str],
    trace: Trace,
    tokens: int,
) -> Cost:
    """What linear layers cost, but those that run on keys; and the routers."""

    def kept(kind: str) -> int:
        if kind not in routed:
            return tokens
        return sum(int(f.units[routed[kind]].ran_BT.sum()) for f in trace.forwards)

    attending = routed.get("attn", routed.get("block"))
    written = tokens
    if attending is not None:
        written = sum(_written(f, attending) for f in trace.forwards)
    query, key = min(kept("attn"), kept("block")) * price.query, written * price.key
    early = (written if "block" in routed else tokens) * price.early
    beside = kept("block") * (price.mlp + price.rest - price.early)
    skipped_mlps = (tokens - kept("mlp")) * price.mlp
    routers = tokens * sum(_router_flops(layer, kind) for kind in routed)
    return Cost(
        query + key + early + beside - skipped_mlps + routers,
        tokens * (dense_price.query + dense_price.key + dense_price.mlp + dense_price.rest),
        0,
        0,
    )


def _key_cost(
    price: LayerCost,
    dense_price: LayerCost,
    sliding: int | None,
    episode: list[ForwardRecord],
    name: str | None,
    config: RoutingConfig,
) -> Cost:
    """What grows with the number of keys: what is done for each, and the cache."""
    pairs = dense_pairs = expanded = dense_expanded = 0
    for stretch in _stretches(episode):
        columns = _Columns.of(stretch, name, config)
        seen_BC = columns.seen(columns.permanent_BC, config.kv_window if name else 0, sliding)
        dense_seen_BC = columns.seen(columns.real_BC, 0, sliding)
        pairs += columns.pairs(columns.ran_BC & ~columns.whole_BC, seen_BC)
        pairs += columns.pairs(columns.whole_BC, dense_seen_BC)
        dense_pairs += columns.pairs(columns.real_BC, dense_seen_BC)
        if price.expand:
            expanded += _expanded(stretch, columns.ran_BC, columns.write_BC, seen_BC)
            real_BC = columns.real_BC
            dense_expanded += _expanded(stretch, real_BC, real_BC, dense_seen_BC)
    return Cost(
        pairs * price.pair + expanded * price.expand,
        dense_pairs * price.pair + dense_expanded * dense_price.expand,
        price.key_bytes
        * columns.held(columns.permanent_BC, config.kv_window if name else 0, sliding),
        price.key_bytes * columns.held(columns.real_BC, 0, sliding),
    )


def _expanded(stretch: _Stretch, ask_BC: Tensor, write_BC: Tensor, seen_BC: Tensor) -> int:
    """How often a key is made from its short form: in each forward, for each row that asks, those
    that are left of earlier forwards and those that are new.
    """
    total = 0
    for forward in stretch.new:
        new = slice(forward.start, forward.start + forward.real_BT.shape[1])
        # The first new query sees what is left, and itself.
        left_B = seen_BC[:, forward.start] - forward.real_BT[:, 0].long()
        asking_B = ask_BC[:, new].any(1)
        total += int(((left_B + write_BC[:, new].sum(1)) * asking_B).sum())
    return total


@dataclass(frozen=True)
class _Stretch:
    """Forwards that each begin where the one before ended, and what was left of earlier ones."""

    past: list[tuple[ForwardRecord, int]]
    """Earlier forwards, and how many columns of each are left after a crop."""
    new: list[ForwardRecord]

    def columns(self, parts: Callable[[ForwardRecord], Tensor]) -> Tensor:
        """One tensor a forward (B, T), side by side: (B, C)."""
        past = [parts(forward)[:, :left] for forward, left in self.past]
        return torch.cat([*past, *(parts(forward) for forward in self.new)], dim=1)


def _stretches(episode: list[ForwardRecord]) -> list[_Stretch]:
    """The forwards over one cache, cut where it was cropped."""
    stretches = [_Stretch([], [])]
    end = 0
    for forward in episode:
        if forward.start < end:
            last = stretches[-1]
            before = [*last.past, *((f, f.real_BT.shape[1]) for f in last.new)]
            past = [(f, min(left, forward.start - f.start)) for f, left in before]
            stretches.append(_Stretch([(f, left) for f, left in past if left > 0], []))
        stretches[-1].new.append(forward)
        end = forward.start + forward.real_BT.shape[1]
    return stretches


@dataclass(frozen=True)
class _Columns:
    """What one attention ran, over all columns of a stretch."""

    real_BC: Tensor
    ran_BC: Tensor
    whole_BC: Tensor
    """Queries that attended among all tokens, though some were skipped."""
    write_BC: Tensor
    """Keys that were made."""
    permanent_BC: Tensor
    """Keys that stay visible beyond the window."""
    begin_BC: Tensor
    """The first column of the packed sequence that a column belongs to."""
    first_new: int

    @classmethod
    def of(cls, stretch: _Stretch, name: str | None, config: RoutingConfig) -> _Columns:
        """`name` is that of the unit; None where it is not routed."""
        real_BC = stretch.columns(lambda f: f.real_BT)
        begin_BC = torch.zeros_like(real_BC, dtype=torch.long)
        packed = stretch.new[0].sequence_BT
        if packed is not None:  # then there is no cache, so this is the only forward
            fresh_BC = packed.diff(dim=1, prepend=packed[:, :1]) != 0
            column_C = torch.arange(real_BC.shape[1], device=real_BC.device)
            begin_BC = torch.where(fresh_BC, column_C, 0).cummax(1).values
        ran_BC = write_BC = permanent_BC = real_BC
        whole_BC = torch.zeros_like(real_BC)
        if name is not None:
            write_BC = stretch.columns(lambda f: _write_BT(f, name))
            ran_BC = stretch.columns(lambda f: f.units[name].ran_BT)
            whole_BC = stretch.columns(lambda f: _whole_BT(f, name))
            keep_BC = stretch.columns(lambda f: f.units[name].keep_BT)
            permanent_BC = real_BC if config.kv == "all" else keep_BC
            if config.kv == "kept" and config.kv_sink:
                position_BC = _count(real_BC, begin_BC)  # from 1
                permanent_BC = keep_BC | (real_BC & (position_BC <= config.kv_sink))
        first_new = stretch.new[0].start
        return cls(real_BC, ran_BC, whole_BC, write_BC, permanent_BC, begin_BC, first_new)

    def seen(self, permanent_BC: Tensor, window: int, sliding: int | None) -> Tensor:
        """How many keys a query at each column sees: permanent ones, and real ones among the latest
        `window`: (B, C).
        """
        width = self.real_BC.shape[1]
        column_C = torch.arange(width, device=self.real_BC.device)
        reach = width if sliding is None else min(sliding, width)
        near = min(max(window, 1), reach)
        far_BC = _count(permanent_BC, self.begin_BC.maximum(column_C - reach + 1))
        near_BC = _count(self.real_BC & ~permanent_BC, self.begin_BC.maximum(column_C - near + 1))
        return far_BC + near_BC

    def pairs(self, query_BC: Tensor, seen_BC: Tensor) -> int:
        """Pairs of a new asking query and a key it sees."""
        return int((seen_BC * query_BC)[:, self.first_new :].sum())

    def held(self, permanent_BC: Tensor, window: int, sliding: int | None) -> int:
        """Keys that the policy holds after the last column."""
        # The next query sees one key less of a window, since it is itself one of the latest.
        width = self.real_BC.shape[1]
        reach = width if sliding is None else min(sliding - 1, width)
        near_BC = self.real_BC & ~permanent_BC
        latest = min(max(window - 1, 0), reach)
        return int(permanent_BC[:, width - reach :].sum() + near_BC[:, width - latest :].sum())


def _count(mask_BC: Tensor, first_BC: Tensor) -> Tensor:
    """How many columns from `first` to the own one are True: (B, C)."""
    sums = torch.nn.functional.pad(mask_BC.long().cumsum(1), (1, 0))
    return sums[:, 1:] - sums.gather(1, first_BC)


def _episodes(forwards: list[ForwardRecord]) -> list[list[ForwardRecord]]:
    """Forwards that continue one cache, together."""
    episodes: list[list[ForwardRecord]] = []
    for forward in forwards:
        if forward.start == 0 or not episodes:
            episodes.append([])
        episodes[-1].append(forward)
    return episodes


def _written(forward: ForwardRecord, name: str) -> int:
    """Tokens whose key and value an attention computed."""
    return int(_write_BT(forward, name).sum())


def _write_BT(forward: ForwardRecord, name: str) -> Tensor:
    write_BT = forward.units[name].write_BT
    assert write_BT is not None, f"{name} has no keys"
    return write_BT


def _whole_BT(forward: ForwardRecord, name: str) -> Tensor:
    """Queries of an attention that ran on all tokens of a forward."""
    whole_BT = forward.units[name].whole_BT
    return torch.zeros_like(forward.real_BT) if whole_BT is None else whole_BT


def _router_flops(layer: nn.Module, kind: str) -> int:
    """FLOPs a token of the router beside a unit."""
    return 2 * sum(p.numel() for p in getattr(layer, router_child(kind)).parameters())


def _head_flops(model: nn.Module) -> int:
    """FLOPs a token of the output head."""
    causal: Any = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    return 2 * head.weight.numel() if head is not None else 0

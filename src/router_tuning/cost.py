"""FLOPs and cache bytes of what a trace ran. Counts, no clock.

A multiply and an add are two FLOPs. Counted are the linear layers, the routers, the attention's
scores and weighted sums (over the visible pairs of query and key only) and the output head; norms,
rotations and activations are left out, in the routed and the dense model alike.

Shapes: B batch, C columns (tokens, pads included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import routing_of
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.record import ForwardRecord, Trace
from router_tuning.units import (
    KINDS,
    attention_of,
    decoder_layers,
    decoder_of,
    part_of,
    router_child,
    unwrap,
)


@dataclass(frozen=True)
class Cost:
    """What a trace cost, beside what the dense model would have cost on the same tokens."""

    flops: float
    dense_flops: float
    kv_bytes: int
    """Bytes of the keys and values that the policy holds at the end."""
    dense_kv_bytes: int

    @property
    def flops_fraction(self) -> float:
        """Routed over dense FLOPs."""
        return self.flops / self.dense_flops


def flops_fraction(model: nn.Module, trace: Trace) -> float:
    """Routed FLOPs over dense FLOPs, decoder and head together, for what the trace ran."""
    return cost(model, trace).flops_fraction


def cost(model: nn.Module, trace: Trace) -> Cost:
    """Add up a trace. Consecutive forwards over one cache are taken together, also where it was
    cropped between them. Beam search reorders rows unseen: there, what a query sees is that of its
    row's own past.

    Raises:
        UnsupportedCallError: the trace begins in the middle of a conversation, or is empty.
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
    fixed = tokens * _head_flops(model)
    total = Cost(fixed, fixed, 0, 0)
    for index, layer in enumerate(decoder_layers(decoder)):
        total = _add(total, _mlp_cost(decoder, layer, index, trace, tokens))
        name = f"layers.{index}.attn"
        routed = name in trace.unit_names
        for episode in _episodes(trace.forwards):
            total = _add(
                total, _attention_cost(decoder, layer, episode, name if routed else None, config)
            )
    return total


def _attention_cost(
    decoder: nn.Module,
    layer: nn.Module,
    episode: list[ForwardRecord],
    name: str | None,
    config: RoutingConfig,
) -> Cost:
    attention: Any = attention_of(decoder, layer)
    sliding = sliding_window_of(attention)
    pairs = dense_pairs = 0
    for stretch in _stretches(episode):
        columns = _Columns.of(stretch, name, config)
        pairs += columns.pairs(columns.keep_BC, columns.permanent_BC, config.kv_window, sliding)
        dense_pairs += columns.pairs(columns.real_BC, columns.real_BC, 0, sliding)
    num_real = sum(int(f.real_BT.sum()) for f in episode)
    num_kept = num_written = num_real
    router = 0
    if name is not None:
        num_kept = sum(int(f.units[name].keep_BT.sum()) for f in episode)
        num_written = sum(_written(f, name) for f in episode)
        router = _router_flops(layer, "attn")
    query = 2 * (attention.q_proj.weight.numel() + attention.o_proj.weight.numel())
    key = 2 * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    pair = 4 * attention.q_proj.weight.shape[0]  # scores and weighted sum, over all query heads
    per_key = 2 * attention.k_proj.weight.shape[0] * attention.k_proj.weight.element_size()
    return Cost(
        num_kept * query + num_written * key + pairs * pair + num_real * router,
        num_real * (query + key) + dense_pairs * pair,
        per_key * columns.held(columns.permanent_BC, config.kv_window if name else 0, sliding),
        per_key * columns.held(columns.real_BC, 0, sliding),
    )


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
    """What one attention kept, over all columns of a stretch."""

    real_BC: Tensor
    keep_BC: Tensor
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
        keep_BC = permanent_BC = real_BC
        if name is not None:
            keep_BC = stretch.columns(lambda f: f.units[name].keep_BT)
            permanent_BC = real_BC if config.kv == "all" else keep_BC
            if config.kv == "kept" and config.kv_sink:
                position_BC = _count(real_BC, begin_BC)  # from 1
                permanent_BC = keep_BC | (real_BC & (position_BC <= config.kv_sink))
        first_new = stretch.new[0].start
        return cls(real_BC, keep_BC, permanent_BC, begin_BC, first_new)

    def pairs(
        self, query_BC: Tensor, permanent_BC: Tensor, window: int, sliding: int | None
    ) -> int:
        """Pairs of a new asking query and a key it sees: a permanent one, or a real one among the
        latest `window`.
        """
        width = self.real_BC.shape[1]
        column_C = torch.arange(width, device=self.real_BC.device)
        reach = width if sliding is None else min(sliding, width)
        near = min(max(window, 1), reach)
        far_BC = _count(permanent_BC, self.begin_BC.maximum(column_C - reach + 1))
        near_BC = _count(self.real_BC & ~permanent_BC, self.begin_BC.maximum(column_C - near + 1))
        return int(((far_BC + near_BC) * query_BC)[:, self.first_new :].sum())

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
    write_BT = forward.units[name].write_BT
    assert write_BT is not None, f"{name} is no attention"
    return int(write_BT.sum())


def _mlp_cost(decoder: nn.Module, layer: nn.Module, index: int, trace: Trace, tokens: int) -> Cost:
    """What is left of a layer without its attention: of an MLP, routed or not."""
    attention = set(part_of(decoder, layer, "attn").modules())
    routers = [getattr(layer, router_child(kind), nn.Module()) for kind in KINDS]
    beside = {module for router in routers for module in router.modules()}
    mlp = set(part_of(decoder, layer, "mlp").modules())
    rest = [m for m in layer.modules() if m not in attention and m not in beside]
    token = _linear_flops(m for m in rest if m in mlp)
    always = _linear_flops(m for m in rest if m not in mlp)
    name = f"layers.{index}.mlp"
    kept, router = tokens, 0
    if name in trace.unit_names:
        kept = sum(int(f.units[name].keep_BT.sum()) for f in trace.forwards)
        router = _router_flops(layer, "mlp")
    return Cost(kept * token + tokens * (always + router), tokens * (token + always), 0, 0)


def _linear_flops(modules: Iterable[nn.Module]) -> int:
    """FLOPs a token of linear layers."""
    return sum(2 * m.weight.numel() for m in modules if isinstance(m, nn.Linear))


def _router_flops(layer: nn.Module, kind: str) -> int:
    """FLOPs a token of the router beside a unit."""
    return 2 * sum(p.numel() for p in getattr(layer, router_child(kind)).parameters())


def _head_flops(model: nn.Module) -> int:
    """FLOPs a token of the output head."""
    causal: Any = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    return 2 * head.weight.numel() if head is not None else 0


def _add(a: Cost, b: Cost) -> Cost:
    return Cost(
        a.flops + b.flops,
        a.dense_flops + b.dense_flops,
        a.kv_bytes + b.kv_bytes,
        a.dense_kv_bytes + b.dense_kv_bytes,
    )

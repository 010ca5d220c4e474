"""FLOPs and cache bytes of what a trace ran. Counts, no clock.

A multiply and an add are two FLOPs. Counted are the linear layers, the routers, the attention's
scores and weighted sums (over the visible pairs of query and key only) and the output head; norms,
rotations and activations are left out, in the routed and the dense model alike.

Shapes: B batch, C columns (tokens, pads included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.execution.context import ROUTER_CHILD, routing_of
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.record import ForwardRecord, Trace
from router_tuning.units import attention_of, decoder_layers, decoder_of, unwrap


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
    """Add up a trace. Consecutive forwards over one cache are taken together."""
    decoder = decoder_of(model)
    config = routing_of(model).config
    tokens = sum(int(f.real_BT.sum()) for f in trace.forwards)
    fixed = tokens * _token_flops_outside_attention(model)
    total = Cost(fixed, fixed, 0, 0)
    for index, layer in enumerate(decoder_layers(decoder)):
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
    real_BC = torch.cat([f.real_BT for f in episode], dim=1)
    keep_BC = write_BC = real_BC
    if name is not None:
        keep_BC = torch.cat([f.units[name].keep_BT for f in episode], dim=1)
        write_BC = torch.cat([f.units[name].write_BT for f in episode], dim=1)
    query = 2 * (attention.q_proj.weight.numel() + attention.o_proj.weight.numel())
    key = 2 * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    pair = 4 * attention.q_proj.weight.shape[0]  # scores and weighted sum, over all query heads
    sliding = sliding_window_of(attention)
    dense_pairs = _visible_pairs(real_BC, real_BC, real_BC, 1, sliding)
    permanent_BC = (
        real_BC
        if config.kv == "all" or name is None
        else _permanent(keep_BC, real_BC, config.kv_sink)
    )
    pairs = _visible_pairs(keep_BC, permanent_BC, real_BC, max(config.kv_window, 1), sliding)
    router = (
        0 if name is None else 2 * sum(p.numel() for p in getattr(layer, ROUTER_CHILD).parameters())
    )
    per_key = 2 * attention.k_proj.weight.shape[0] * attention.k_proj.weight.element_size()
    num_real = int(real_BC.sum())
    return Cost(
        int(keep_BC.sum()) * query + int(write_BC.sum()) * key + pairs * pair + num_real * router,
        num_real * (query + key) + dense_pairs * pair,
        per_key * _held(permanent_BC, real_BC, config.kv_window if name else 0, sliding),
        per_key * _held(real_BC, real_BC, 0, sliding),
    )


def _visible_pairs(
    query_BC: Tensor, permanent_BC: Tensor, real_BC: Tensor, window: int, sliding: int | None
) -> int:
    """Pairs of an asking query and a key it sees: a permanent one, or a real one among the latest
    `window`.
    """
    width = real_BC.shape[1]
    reach = width if sliding is None else min(sliding, width)
    far_BC = _in_last(permanent_BC, reach)
    near_BC = _in_last(real_BC & ~permanent_BC, min(window, reach))
    return int(((far_BC + near_BC) * query_BC).sum())


def _in_last(mask_BC: Tensor, reach: int) -> Tensor:
    """How many of the last `reach` columns, the own one included, are True: (B, C)."""
    sums = mask_BC.long().cumsum(1)
    return sums - torch.nn.functional.pad(sums, (reach, 0))[:, : sums.shape[1]]


def _held(permanent_BC: Tensor, real_BC: Tensor, window: int, sliding: int | None) -> int:
    # The next query sees one key less of a window, since it is itself one of the latest.
    reach = real_BC.shape[1] if sliding is None else min(sliding - 1, real_BC.shape[1])
    near = real_BC & ~permanent_BC
    latest = min(max(window - 1, 0), reach)
    held = int(permanent_BC[:, real_BC.shape[1] - reach :].sum())
    return held + (int(near[:, real_BC.shape[1] - latest :].sum()) if latest else 0)


def _permanent(keep_BC: Tensor, real_BC: Tensor, sink: int) -> Tensor:
    return keep_BC | (real_BC & (real_BC.long().cumsum(1) <= sink)) if sink else keep_BC


def _episodes(forwards: list[ForwardRecord]) -> list[list[ForwardRecord]]:
    """Forwards that continue one cache, together."""
    episodes: list[list[ForwardRecord]] = []
    for forward in forwards:
        if forward.start == 0 or not episodes:
            episodes.append([])
        episodes[-1].append(forward)
    return episodes


def _token_flops_outside_attention(model: nn.Module) -> int:
    """FLOPs a token of the MLPs' linear layers and of the output head."""
    decoder = decoder_of(model)
    total = 0
    for layer in decoder_layers(decoder):
        skip = set(attention_of(decoder, layer).modules()) | set(
            getattr(layer, ROUTER_CHILD, nn.Module()).modules()
        )
        total += sum(
            2 * m.weight.numel()
            for m in layer.modules()
            if isinstance(m, nn.Linear) and m not in skip
        )
    causal: Any = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    return total + (2 * head.weight.numel() if head is not None else 0)


def _add(a: Cost, b: Cost) -> Cost:
    return Cost(
        a.flops + b.flops,
        a.dense_flops + b.dense_flops,
        a.kv_bytes + b.kv_bytes,
        a.dense_kv_bytes + b.dense_kv_bytes,
    )

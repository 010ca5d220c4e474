"""Run the layers below the first routed one once for two passes over the same tokens.

Below the first layer with a router, or with LoRA that a dense pass leaves out, the dense and the
routed pass compute the same thing. The first pass captures what the last of these layers returned;
in the second, all of them return that instead of running. Their forwards are set on the instances
inside a `with` block and put back when it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from router_tuning.execution.context import left_out_when_dense, routing_of
from router_tuning.units import decoder_layers, decoder_of, unwrap


@dataclass
class Prefix:
    """The layers that both passes share, and what the last of them returned."""

    layers: list[nn.Module]
    output: Any = None


def shared_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers below the first that runs otherwise in a dense pass; none if something
    below it trains.
    """
    decoder = decoder_of(model)
    routed = min(unit.layer_idx for unit in routing_of(model).units)
    same = itertools.takewhile(_runs_alike, decoder_layers(decoder)[:routed])
    below = list(same)
    embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    trains = any(p.requires_grad for module in [*below, embedding] for p in module.parameters())
    return [] if trains else below


def _runs_alike(layer: nn.Module) -> bool:
    return not any(left_out_when_dense(module) for module in layer.modules())


@contextmanager
def capture_prefix(model: nn.Module) -> Iterator[Prefix]:
    """Keep what the last shared layer returns in the forward inside the block."""
    prefix = Prefix(shared_layers(model))
    if not prefix.layers:
        yield prefix
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        prefix.output = output

    handle = prefix.layers[-1].register_forward_hook(keep)
    try:
        yield prefix
    finally:
        handle.remove()


@contextmanager
def reuse_prefix(prefix: Prefix) -> Iterator[None]:
    """Let the captured output stand for the shared layers in the forwards inside the block."""
    if prefix.output is None:
        yield
        return

    def captured(*args: Any, **kwargs: Any) -> Any:
        return prefix.output

    before = [layer.__dict__.get("forward") for layer in prefix.layers]
    try:
        for layer in prefix.layers:
            layer.__dict__["forward"] = captured
        yield
    finally:
        for layer, forward in zip(prefix.layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward

"""Run only the upper decoder layers, on states that an earlier forward brought to them.

The lower layers' forwards are replaced on the instances inside a `with` block and put back when it
ends, whatever happens.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from router_tuning.units import decoder_layers, family_of


@contextmanager
def entering_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, a forward puts the states (B, T, D) that enter each layer into the list."""
    states: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in decoder_layers(decoder)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def run_from(decoder: nn.Module, first: int, state_BTD: Tensor) -> Iterator[None]:
    """Inside the block a forward starts at decoder layer `first`, with the given state entering
    it.
    """
    lower = decoder_layers(decoder)[:first]
    output = (state_BTD, None) if family_of(decoder).layer_tuple else state_BTD

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return output

    before = [layer.__dict__.get("forward") for layer in lower]
    try:
        for layer in lower:
            layer.__dict__["forward"] = skipped
        yield
    finally:
        for layer, forward in zip(lower, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward

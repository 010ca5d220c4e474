"""How a forward's context reaches its units, and a gate its post-norm.

Layers and attentions are called with keywords, and an attention leaves the context for the MLP
behind it in a variable of the running context. That happens inside the layer, so activation
checkpointing does it again when it runs a layer again. Families that hand no keywords on find the
context where the door left it, which activation checkpointing does not do again. A gate waits in
such a variable too, since a residual branch may end in a norm that is called with nothing else.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from router_tuning.execution.context import CONTEXT_KEY, ForwardContext, original_forward
from router_tuning.units import Unit

_context: contextvars.ContextVar[tuple[int, ForwardContext] | None] = contextvars.ContextVar(
    "router_tuning_context", default=None
)
_forward: contextvars.ContextVar[ForwardContext | None] = contextvars.ContextVar(
    "router_tuning_forward", default=None
)
_gate: contextvars.ContextVar[tuple[str, Tensor] | None] = contextvars.ContextVar(
    "router_tuning_gate", default=None
)


class Sent:
    """A context on its way to a layer, among its keyword arguments.

    Not a dataclass: of those that hold tensors FSDP2 makes a copy for each layer, and what a layer
    records in a copy is lost.
    """

    __slots__ = ("context",)

    def __init__(self, context: ForwardContext) -> None:
        self.context = context


@contextmanager
def opened(context: ForwardContext | None) -> Iterator[None]:
    """Leave the context at the door for all units of the forward inside the block."""
    token = _forward.set(context)
    try:
        yield
    finally:
        _forward.reset(token)


def handed_in(kwargs: dict[str, Any]) -> ForwardContext | None:
    """The context among keyword arguments, taken out, or else at the door; None outside a routed
    forward.
    """
    sent: Sent | None = kwargs.pop(CONTEXT_KEY, None)
    return _forward.get() if sent is None else sent.context


def hand_over(attention: nn.Module, context: ForwardContext | None) -> None:
    """Leave the context for the MLP behind an attention, where that is routed."""
    layer_idx: int | None = attention.__dict__.get("skip_followed_by")
    if layer_idx is not None:
        _context.set(None if context is None else (layer_idx, context))


def taken_over(unit: Unit) -> ForwardContext | None:
    """The context that the attention before this MLP left, or else at the door; None outside a
    routed forward.
    """
    left = _context.get()
    _context.set(None)
    return left[1] if left is not None and left[0] == unit.layer_idx else _forward.get()


def gated(output_BTD: Tensor, gate_BT: Tensor, unit: Unit, context: ForwardContext) -> Tensor:
    """A unit's output times its gate (B, T), or the output with the gate left for the post-norm."""
    if context.post_norm(unit) is not None:
        _gate.set((unit.name, gate_BT))
        return output_BTD
    return output_BTD * gate_BT[..., None].to(output_BTD.dtype)


def gate_post_norm(norm: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a sandwich family's post-norm: the gate acts after it, where a norm cannot undo
    it.
    """
    output = original_forward(norm)(*args, **kwargs)
    waiting = _gate.get()
    if waiting is None or waiting[0] != norm.__dict__["skip_unit"].name:
        return output
    _gate.set(None)
    return output * waiting[1][..., None].to(output.dtype)

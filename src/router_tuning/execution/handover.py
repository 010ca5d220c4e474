"""What one part of a decoder layer leaves for the next: the context, and a gate for a post-norm.

Only attentions are called with keywords, and a residual branch ends in a norm that is called with
nothing else, so both are handed over in a variable of the running context, and taken at once. That
happens inside the layer, so activation checkpointing does it again when it runs a layer again.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextvars
from typing import Any

from torch import Tensor, nn

from router_tuning.execution.context import ForwardContext, original_forward
from router_tuning.units import Unit

_context: contextvars.ContextVar[tuple[int, ForwardContext] | None] = contextvars.ContextVar(
    "router_tuning_context", default=None
)
_gate: contextvars.ContextVar[tuple[str, Tensor] | None] = contextvars.ContextVar(
    "router_tuning_gate", default=None
)


def hand_over(attention: nn.Module, context: ForwardContext | None) -> None:
    """Leave the context for the MLP behind an attention, where that is routed."""
    layer_idx: int | None = attention.__dict__.get("skip_followed_by")
    if layer_idx is not None:
        _context.set(None if context is None else (layer_idx, context))


def taken_over(unit: Unit) -> ForwardContext | None:
    """The context that the attention before this MLP left; None outside a routed forward."""
    left = _context.get()
    _context.set(None)
    return left[1] if left is not None and left[0] == unit.layer_idx else None


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

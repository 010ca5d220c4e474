"""The differentiable path: every unit is computed, and what was skipped is hidden.

Saves nothing. Used for training, where the gradient must also reach skipped tokens, and as the
reference that the skipping path is tested against.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import CONTEXT_KEY, ForwardContext
from router_tuning.execution.handover import Sent
from router_tuning.execution.standing_in import can_stand_in, own_forward, standing_in
from router_tuning.execution.visibility import (
    additive,
    allowed_keys,
    kept_keys,
    permanent,
    recent,
)
from router_tuning.execution.weighed import KeyWeights, WeighedRun
from router_tuning.units import Unit


def masked_call(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    unit: Unit,
    context: ForwardContext,
) -> Any:
    """What an attention, or a layer around it, returns for every token; its gate has still to be
    applied.
    """
    keep_BT = decided.keep_BT
    write_BT = context.real_BT if context.config.kv == "all" else permanent(keep_BT, context)
    decided.note(unit, context, write_BT)
    if context.config.kv == "all":
        return call.without_cache(call.mask).run(dense_forward)
    hidden = int(keep_BT.sum()) < context.num_real
    # Nothing hidden: the dense call itself, so that fresh routers change no bit.
    if not (hidden or context.weighed_keys):
        return call.without_cache(call.mask).run(dense_forward)
    return _with_kept_keys(dense_forward, attention, call, decided, unit, context)


def _with_kept_keys(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    unit: Unit,
    context: ForwardContext,
) -> Any:
    """The same where some keys may be hidden, with the gradients of the keys' decisions."""
    keep_BT = decided.keep_BT
    implementation = attention.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedCallError(
            f'kv="kept" hides keys by a mask while training, which attention implementation '
            f'{implementation!r} does not take; load the model with attn_implementation="sdpa" or '
            '"eager"'
        )
    allowed = allowed_keys(attention, call.mask, context)
    shown = kept_keys(allowed, keep_BT, context)
    weights = _key_weights(decided, allowed, shown, context)
    if weights is None:
        mask = shown if implementation == "sdpa" else additive(shown, call.x_BTD.dtype)
        return call.without_cache(mask).run(dense_forward)
    if not can_stand_in(attention):
        return call.without_cache(weights.mask(call.x_BTD.dtype)).run(dense_forward)
    run = WeighedRun(attention, weights)
    # The function takes its mask from the weights; this one is for what comes before it.
    call = call.without_cache(shown)
    if unit.kind == "attn":
        with standing_in(run):
            return call.run(own_forward(attention, dense_forward))
    # Activation checkpointing runs a layer again without what stands around this call.
    context.stand_ins[attention] = run
    if context.family.keywords:
        call = call.over(None, {**call.kwargs, CONTEXT_KEY: Sent(context)})
    return call.run(dense_forward)


def _key_weights(
    decided: Decided, allowed: Tensor, shown: Tensor, context: ForwardContext
) -> KeyWeights | None:
    """What gradients reach the decisions of keys by; None where none is wanted. Keys of the sink
    stay whatever is decided, and those of the window while they are in it.
    """
    soft_BT = decided.soft_BT
    if soft_BT is None or not soft_BT.requires_grad:
        return None
    sink_BT = context.position_BT < context.config.kv_sink
    gate_BT = (soft_BT - soft_BT.detach()).masked_fill(sink_BT, 0.0)
    column_1T = context.column_T[None]
    nearby = recent(column_1T, column_1T, max(context.config.kv_window, 1))
    return KeyWeights(gate_BT, shown, allowed & ~nearby[:, None])

"""The forward that stands before each attention: decide, record, and carry the decision out.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

import contextvars
from typing import Any

from torch import Tensor, nn

from router_tuning.decide import Decision, pool_prefix
from router_tuning.execution.cache import PrefixLogits, RoutedCacheLayer, check_layer, touch
from router_tuning.execution.call import AttentionCall, Decided
from router_tuning.execution.context import CONTEXT_KEY, ForwardContext, original_forward
from router_tuning.execution.masked import masked_attention
from router_tuning.execution.tokens import skipping_attention
from router_tuning.units import Unit, is_sequence

_gate: contextvars.ContextVar[tuple[str, Tensor] | None] = contextvars.ContextVar(
    "router_tuning_gate", default=None
)


def routed_attention(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a routed attention's forward; without a context it is the dense forward."""
    context: ForwardContext | None = kwargs.pop(CONTEXT_KEY, None)
    dense_forward = original_forward(attention)
    if context is None:
        return dense_forward(*args, **kwargs)
    call = AttentionCall.read(args, kwargs)
    unit: Unit = attention.__dict__["skip_unit"]
    if context.masked:
        decision = _decide(unit, call.x_BTD, context, None)
        output, gate_BT = masked_attention(dense_forward, attention, call, decision, unit, context)
        if context.post_norm(unit) is not None:
            _gate.set((unit.name, gate_BT))
            return output, None
        return output * gate_BT[..., None].to(output.dtype), None
    layer = _cache_layer(call.cache, unit, context)
    decision = _decide(unit, call.x_BTD, context, layer)
    return skipping_attention(dense_forward, attention, call, decision, layer, unit, context)


def carry_context(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for an unrouted attention's forward: attention kernels must not see the context."""
    kwargs.pop(CONTEXT_KEY, None)
    return original_forward(attention)(*args, **kwargs)


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


def _decide(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decided:
    if context.decider is not None:
        keep_BT = context.decider(unit, x_BTD, context) & context.real_BT
        return Decided(keep_BT, keep_BT.float() if context.masked else None, None)
    decision = _logits(unit, x_BTD, context, layer)
    logits_BT = decision.logits_BT.detach()
    if context.masked:
        # Padding is gated like any token, since nobody reads it: fresh routers then change no bit
        # there either.
        soft_BT = decision.straight_through(context.threshold_B1)
        return Decided(
            (soft_BT.detach() > 0.5) & context.real_BT, soft_BT, logits_BT, decision.always_BT
        )
    keep_BT = decision.keep(context.threshold_B1) & context.real_BT
    return Decided(keep_BT, None, logits_BT, decision.always_BT)


def _logits(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    logits_BT = context.router(unit)(x_BTD)
    if not is_sequence(context.granularity(unit)):
        return Decision(logits_BT)
    after = context.config.decide_after
    prefix = None if layer is None else layer.prefix
    if layer is not None:
        prefix = prefix or PrefixLogits(context.rows, after, x_BTD.device)
        layer.prefix = prefix
    past = None if prefix is None else prefix.sums()
    decision = pool_prefix(
        logits_BT, context.position_BT, context.real_BT, after, past, context.sequence_BT
    )
    if prefix is not None:
        prefix_BT = context.real_BT & (context.position_BT < after)
        prefix.add(logits_BT, context.position_BT, prefix_BT, context.column_T)
    return decision


def _cache_layer(cache: Any, unit: Unit, context: ForwardContext) -> RoutedCacheLayer | None:
    """The routed cache layer, where the policy or the granularity needs one."""
    if cache is None:
        return None
    if context.config.kv == "kept" or is_sequence(context.granularity(unit)):
        return touch(cache, unit.layer_idx)
    check_layer(cache, unit.layer_idx)
    return None

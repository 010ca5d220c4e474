"""The forwards that stand before attentions: decide, record, and carry the decision out.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from router_tuning.execution.cache import RoutedCacheLayer, check_layer, touch
from router_tuning.execution.call import AttentionCall
from router_tuning.execution.context import CONTEXT_KEY, ForwardContext, original_forward
from router_tuning.execution.deciding import decide
from router_tuning.execution.handover import gated, hand_over
from router_tuning.execution.masked import masked_attention
from router_tuning.execution.tokens import skipping_attention
from router_tuning.units import Unit, is_sequence


def routed_attention(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a routed attention's forward; without a context it is the dense forward."""
    context: ForwardContext | None = kwargs.pop(CONTEXT_KEY, None)
    hand_over(attention, context)
    dense_forward = original_forward(attention)
    if context is None:
        return dense_forward(*args, **kwargs)
    call = AttentionCall.read(args, kwargs)
    unit: Unit = attention.__dict__["skip_unit"]
    if context.masked:
        decision = decide(unit, call.x_BTD, context, None)
        output, gate_BT = masked_attention(dense_forward, attention, call, decision, unit, context)
        return gated(output, gate_BT, unit, context), None
    layer = _cache_layer(call.cache, unit, context)
    decision = decide(unit, call.x_BTD, context, layer)
    return skipping_attention(dense_forward, attention, call, decision, layer, unit, context)


def carry_context(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for an unrouted attention's forward: attention kernels must not see the context."""
    hand_over(attention, kwargs.pop(CONTEXT_KEY, None))
    return original_forward(attention)(*args, **kwargs)


def _cache_layer(cache: Any, unit: Unit, context: ForwardContext) -> RoutedCacheLayer | None:
    """The routed cache layer, where the policy or the granularity needs one."""
    if cache is None:
        return None
    if context.config.kv == "kept" or is_sequence(context.granularity(unit)):
        return touch(cache, unit.layer_idx)
    check_layer(cache, unit.layer_idx)
    return None

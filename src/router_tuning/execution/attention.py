"""The forwards that stand before attentions: decide, record, and carry the decision out.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn

from router_tuning.execution.cache import RoutedCacheLayer, check_layer, touch
from router_tuning.execution.call import UnitCall
from router_tuning.execution.context import ForwardContext, original_forward
from router_tuning.execution.deciding import decide
from router_tuning.execution.handover import gated, hand_over, handed_in
from router_tuning.execution.masked import masked_call
from router_tuning.execution.skipping import skipping_call
from router_tuning.execution.standing_in import own_forward, standing_in
from router_tuning.execution.visibility import check_packed
from router_tuning.units import Unit, first_of


def routed_attention(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a routed attention's forward; without a context it is the dense forward."""
    context = handed_in(kwargs)
    hand_over(attention, context)
    dense_forward = original_forward(attention)
    if context is None:
        return dense_forward(*args, **kwargs)
    call = UnitCall.read(attention, args, kwargs)
    check_packed(call.mask, context)
    unit: Unit = attention.__dict__["skip_unit"]
    if context.masked:
        decided = decide(unit, call.x_BTD, context, None)
        output = masked_call(dense_forward, attention, call, decided, unit, context)
        assert decided.soft_BT is not None
        return gated(first_of(output), decided.soft_BT, unit, context), None
    layer = cache_layer(call.cache, unit, context)
    decided = decide(unit, call.x_BTD, context, layer)
    return skipping_call(
        dense_forward, attention, call, decided, layer, unit, context, skipped_BTD=None
    ), None


def carry_context(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for an unrouted attention's forward: attention kernels must not see the context."""
    context = handed_in(kwargs)
    hand_over(attention, context)
    run = None if context is None else context.stand_ins.get(attention)
    with nullcontext() if run is None else standing_in(run):
        return own_forward(attention, original_forward(attention))(*args, **kwargs)


def cache_layer(cache: Any, unit: Unit, context: ForwardContext) -> RoutedCacheLayer | None:
    """The routed cache layer of a unit, where the policy or the granularity needs one."""
    if cache is None:
        return None
    every_key = context.config.kv == "all"
    if not every_key or unit.kind in context.sequence_kinds:
        adapter = context.routing.adapter
        return touch(cache, unit.layer_idx, every_key=every_key, adapter=adapter)
    if context.cache is None:  # the decoder made this one, after the door
        check_layer(cache, unit.layer_idx, every_key=every_key)
    return None

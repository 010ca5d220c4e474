"""The forward that stands before each routed block, on either path: a whole decoder layer.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from router_tuning.execution.attention import cache_layer
from router_tuning.execution.call import UnitCall
from router_tuning.execution.context import original_forward
from router_tuning.execution.deciding import decide
from router_tuning.execution.handover import handed_in
from router_tuning.execution.masked import masked_call
from router_tuning.execution.skipping import skipping_call
from router_tuning.execution.visibility import check_packed
from router_tuning.units import Unit, attention_of, first_of


def routed_block(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a routed layer's forward; without a context it is the dense forward."""
    context = handed_in(kwargs)
    dense_forward = original_forward(layer)
    if context is None:
        return dense_forward(*args, **kwargs)
    call = UnitCall.read(layer, args, kwargs)
    check_packed(call.mask, context)
    unit: Unit = layer.__dict__["skip_unit"]
    attention = attention_of(context.decoder, layer)
    assert attention is not None
    if context.masked:
        decided = decide(unit, call.x_BTD, context, None)
        output = masked_call(dense_forward, attention, call, decided, unit, context)
        assert decided.soft_BT is not None
        gate = decided.soft_BT[..., None].to(call.x_BTD.dtype)
        # Not x + gate * (output - x): a gate of 1 must change no bit.
        state = gate * first_of(output) + (1 - gate) * call.x_BTD
    else:
        memory = cache_layer(call.cache, unit, context)
        decided = decide(unit, call.x_BTD, context, memory)
        state = skipping_call(
            dense_forward, attention, call, decided, memory, unit, context, call.x_BTD
        )
    return (state, None) if context.family.layer_tuple else state

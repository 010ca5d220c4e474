"""The forward that stands before each routed MLP, on either path.

An MLP sees one token at a time, so the kept tokens of all rows are run as one flat row.

Shapes: B batch, T tokens of this forward, N kept tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from router_tuning.execution.cache import RoutedCacheLayer, touch
from router_tuning.execution.call import UnitCall
from router_tuning.execution.context import ForwardContext, original_forward
from router_tuning.execution.deciding import decide
from router_tuning.execution.handover import gated, taken_over
from router_tuning.units import Unit, first_of


def routed_mlp(mlp: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a routed MLP's forward; without a context it is the dense forward."""
    unit: Unit = mlp.__dict__["skip_unit"]
    context = taken_over(unit)
    dense_forward = original_forward(mlp)
    if context is None:
        return dense_forward(*args, **kwargs)
    x_BTD = UnitCall.read(mlp, args, kwargs).x_BTD
    decided = decide(unit, x_BTD, context, _cache_layer(unit, context))
    decided.note(unit, context, write_BT=None)
    if context.masked:
        assert decided.soft_BT is not None
        output = dense_forward(x_BTD)
        return _like(output, gated(first_of(output), decided.soft_BT, unit, context))
    if decided.everything(context):
        return dense_forward(x_BTD)
    if not decided.num_kept:
        nothing_BTD = x_BTD.new_zeros(x_BTD.shape)
        return (nothing_BTD, None) if context.family.mlp_tuple else nothing_BTD
    output = dense_forward(decided.kept.flat(x_BTD))
    # Autocast changes the dtype.
    return _like(output, decided.kept.put(first_of(output)[0].to(x_BTD.dtype)))


def _like(output: Any, state_BTD: Tensor) -> Any:
    """Hidden states with whatever else an MLP returns, such as its experts' scores."""
    return (state_BTD, *output[1:]) if isinstance(output, tuple) else state_BTD


def _cache_layer(unit: Unit, context: ForwardContext) -> RoutedCacheLayer | None:
    """Where a sequence decision is remembered from one forward to the next."""
    if context.cache is None or unit.kind not in context.sequence_kinds:
        return None
    adapter = context.routing.adapter
    return touch(context.cache, unit.memory, every_key=True, adapter=adapter)

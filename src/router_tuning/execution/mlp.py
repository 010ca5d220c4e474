"""The forward that stands before each routed MLP, on either path.

An MLP sees one token at a time, so the kept tokens of all rows are run as one flat row.

Shapes: B batch, T tokens of this forward, N kept tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from router_tuning.execution.cache import RoutedCacheLayer, touch
from router_tuning.execution.context import ForwardContext, original_forward
from router_tuning.execution.deciding import decide
from router_tuning.execution.handover import gated, taken_over
from router_tuning.units import Unit, is_sequence


def routed_mlp(mlp: nn.Module, x_BTD: Tensor) -> Any:
    """Stand-in for a routed MLP's forward; without a context it is the dense forward."""
    unit: Unit = mlp.__dict__["skip_unit"]
    context = taken_over(unit)
    dense_forward = original_forward(mlp)
    if context is None:
        return dense_forward(x_BTD)
    decided = decide(unit, x_BTD, context, _cache_layer(unit, context))
    context.note(unit, decided.record(None, context))
    if context.masked:
        assert decided.soft_BT is not None
        return gated(dense_forward(x_BTD), decided.soft_BT, unit, context)
    num_kept = int(decided.keep_BT.sum())
    if num_kept == context.num_real:
        return dense_forward(x_BTD)
    output = x_BTD.new_zeros(x_BTD.shape)
    if num_kept:
        kept_ND = dense_forward(x_BTD[decided.keep_BT][None])[0]
        output[decided.keep_BT] = kept_ND.to(output.dtype)  # autocast changes it
    return output


def _cache_layer(unit: Unit, context: ForwardContext) -> RoutedCacheLayer | None:
    """Where a sequence decision is remembered from one forward to the next."""
    if context.cache is None or not is_sequence(context.granularity(unit)):
        return None
    return touch(context.cache, unit.layer_idx)

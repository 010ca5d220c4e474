"""The skipping path of attentions and blocks: only kept tokens run, only the policy's keys are made
and cached.

Shapes: B batch, T tokens of this forward, N kept tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.flat import FlatRun, can_run_flat
from router_tuning.execution.grouped import grouped_run
from router_tuning.execution.keys import keys_of, lasting, store_all, store_kept, written
from router_tuning.execution.paying import runs_whole
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.whole import whole_call
from router_tuning.units import Unit, first_of


def skipping_call(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
    skipped_BTD: Tensor | None,
) -> Tensor:
    """What a unit gives (B, T, D): at its kept tokens what its own forward does, at the others what
    is given for skipped ones, zeros for None. The attention is the unit's own, or the unit itself.
    """
    if (layer is None or layer.store is None) and decided.everything(context):
        decided.note(unit, context, context.real_BT)
        return first_of(call.run(dense_forward))
    if runs_whole(attention, decided, call.x_BTD, unit, context):
        return whole_call(dense_forward, attention, call, decided, layer, unit, context)
    write_BT = written(decided, call, context)
    decided.note(unit, context, write_BT)
    if layer is not None and context.config.kv == "kept":
        layer.begin_skipping(context.rows, context.config.kv_window, context.host_real_BC)
    places = Places.where(write_BT & ~decided.host_BT, call.x_BTD.device)
    extra = keys_of(places, dense_forward, attention, call, unit, context)
    if not decided.num_kept:
        _store(extra, call, decided, layer, unit, context)
        return call.x_BTD.new_zeros(call.x_BTD.shape) if skipped_BTD is None else skipped_BTD
    if can_run_flat(attention, context):
        run = FlatRun(attention, call, decided, extra, layer, unit, context)
        output_ND = run.output(dense_forward)
        if output_ND is not None:
            return _in_place(output_ND, decided.kept, call, skipped_BTD)
    output_ND, made = grouped_run(
        dense_forward, attention, call, decided, extra, layer, unit, context
    )
    _store(made, call, decided, layer, unit, context)
    return _in_place(output_ND, decided.kept, call, skipped_BTD)


def _store(
    made: MadeKeys | None,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
) -> None:
    if call.cache is None:
        return
    if context.config.kv == "all":
        assert made is not None, "every real token's key was made"
        store_all(made, call, unit, context)
        return
    assert layer is not None
    store_kept(made, lasting(decided.host_BT, context), layer, context)


def _in_place(
    output_ND: Tensor, kept: Places, call: UnitCall, skipped_BTD: Tensor | None
) -> Tensor:
    """The kept tokens' states among the skipped ones': (B, T, D)."""
    x_BTD = call.x_BTD
    output_ND = output_ND.to(x_BTD.dtype)  # autocast changes it
    if skipped_BTD is None:
        return kept.put(output_ND)
    output = skipped_BTD.clone()
    output[kept.there] = output_ND
    return output

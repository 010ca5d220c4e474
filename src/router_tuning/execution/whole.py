"""An attention on all tokens of a forward, where leaving some out takes longer (paying.py): what it
gives for skipped ones is thrown away, and with kv="kept" a mask hides their keys.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.call import MASK, Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.keys import HandedCache, lasting, store_kept, written
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.visibility import (
    additive,
    allowed_keys,
    near_keys,
    shown_keys,
    sliding_window_of,
)
from router_tuning.units import Unit, first_of


def whole_call(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
) -> Tensor:
    """What an attention gives at its kept tokens, zeros at the others: (B, T, D)."""
    decided.note(unit, context, context.real_BT, context.real_BT)
    if context.config.kv == "all":
        output_BTD = first_of(call.run(dense_forward))
    else:
        output_BTD = _with_hidden_keys(dense_forward, attention, call, decided, layer, context)
    return output_BTD.masked_fill(~decided.keep_BT[..., None], 0)


def _with_hidden_keys(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    context: ForwardContext,
) -> Tensor:
    """The same with the keys of skipped tokens hidden, and those of the policy stored."""
    taken: list[Tensor] = []

    def take(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        taken.extend((key, value))
        return key, value

    shown = _shown(attention, call.mask, decided.keep_BT, context)
    eager = attention.config._attn_implementation == "eager"  # type: ignore[union-attr]
    mask = additive(shown, call.x_BTD.dtype) if eager else shown
    cache = None if layer is None else HandedCache(call.cache, take)
    part = call.over(cache, {**call.kwargs, MASK: mask})
    output_BTD = first_of(part.run(dense_forward))
    if layer is not None:
        layer.begin_skipping(context.rows, context.config.kv_window, context.host_real_BC)
        places = Places.where(written(decided, call, context), call.x_BTD.device)
        key, value = (places.pick(x.transpose(1, 2)) for x in taken)
        store_kept(MadeKeys(places, key, value), lasting(decided.host_BT, context), layer, context)
    return output_BTD


def _shown(attention: nn.Module, mask: Any, keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """The keys that each query sees (B, 1, T, T). What does not depend on decisions is worked out
    once for all attentions with the same mask.
    """
    of = id(mask), sliding_window_of(attention)
    if of not in context.shown:
        allowed = allowed_keys(attention, mask, context)
        # With the mask itself, so that its number is not given to another.
        context.shown[of] = mask, allowed, near_keys(allowed, context)
    _, allowed, near = context.shown[of]
    return shown_keys(allowed, near, keep_BT, context)

"""The keys that a unit makes: of which tokens, how those of skipped tokens are made, where they go.

Shapes: B batch, T tokens of this forward, N chosen tokens, H key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedModelError
from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.projections import keys_values
from router_tuning.units import Unit


class HandedCache:
    """Stands for the cache in a unit's call: `take` gets the new keys and values (R, H, L, D), and
    gives those to attend to.
    """

    def __init__(self, real: Any, take: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._real = real
        self._take = take

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a unit calls with its new keys."""
        return self._take(key, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("layers", "offloading") and self._real is not None:
            return getattr(self._real, name)
        raise UnsupportedModelError(
            f"a unit asks its cache for {name!r}, so it is no function of its kept tokens and "
            "their keys alone; leave its layer out of `layers`, or route another kind of unit"
        )


class _KeysTaken(Exception):
    """Ends a unit's forward when its keys are made."""


def lasting(keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """Tokens whose keys stay visible, on the host: (B, T)."""
    config = context.config
    if config.kv == "all":
        return context.host_real_BT
    if not config.kv_sink:
        return keep_BT
    return keep_BT | (context.host_real_BT & (context.host_position_BT < config.kv_sink))


def written(decided: Decided, call: UnitCall, context: ForwardContext) -> Tensor:
    """Tokens whose key and value are made, on the host: (B, T)."""
    if call.cache is None and not decided.num_kept:
        return torch.zeros_like(decided.host_BT)  # nobody will ever ask for them
    if context.config.kv_window:
        return context.host_real_BT
    return lasting(decided.host_BT, context)


def keys_of(
    places: Places,
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    unit: Unit,
    context: ForwardContext,
) -> MadeKeys | None:
    """Keys and values of some tokens, without attending; None if there are no tokens.

    An attention of known parts makes just these; of any other, and of what stands before it in a
    block, the forward runs up to the point where it hands them over.
    """
    if not len(places):
        return None
    if context.family.parts:
        x_ND = places.pick(call.x_BTD)
        norm = context.routing.input_norms[unit.layer_idx]
        if unit.kind == "block" and norm is not None:
            x_ND = getattr(context.layers[unit.layer_idx], norm)(x_ND)
        rope = (places.pick(call.rope[0]), places.pick(call.rope[1]))
        return MadeKeys(places, *keys_values(attention, x_ND, rope))
    taken: list[Tensor] = []

    def take(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        taken.extend(x[0].transpose(0, 1) for x in (key, value))
        raise _KeysTaken

    try:
        call.at(places.flat, None, HandedCache(call.cache, take)).run(dense_forward)
    except _KeysTaken:
        return MadeKeys(places, *taken)
    raise no_keys(attention, unit)


def no_keys(attention: nn.Module, unit: Unit) -> UnsupportedModelError:
    """The error where an attention does not tell its keys."""
    return UnsupportedModelError(
        f"{type(attention).__name__} of {unit.name} handed no keys to its cache, so what it "
        "attends to is not known; leave its layer out of `layers`"
    )


def store_all(
    made: MadeKeys, call: UnitCall, unit: Unit, context: ForwardContext
) -> tuple[Tensor, Tensor, int]:
    """kv="all": put every real token's key into the ordinary cache, zeros at padding. Gives back
    the keys and values of all columns that the cache still has (B, H, C, D), and the first column.
    """
    key, value = (
        made.places.put(x.detach()).transpose(1, 2) for x in (made.key_NHD, made.value_NHD)
    )
    length = context.column_T.numel()
    first = first_column(call, unit, context)
    key, value = call.cache.update(key, value, unit.layer_idx)
    # A static layer gives back places that are not filled yet, too.
    end = context.start + length - first
    return key[:, :, :end], value[:, :, :end], first


def first_column(call: UnitCall, unit: Unit, context: ForwardContext) -> int:
    """The column that the keys of a cache begin with: those before it are out of sight."""
    if call.cache is None:
        return 0
    return int(call.cache.get_mask_sizes(context.column_T.numel(), unit.layer_idx)[1])


def store_kept(
    made: MadeKeys | None,
    lasting_BT: Tensor,
    layer: RoutedCacheLayer,
    context: ForwardContext,
) -> None:
    """kv="kept": put the made keys into the layer's store."""
    assert layer.store is not None
    if made is not None:
        row_N, token_N = made.places.row_N, made.places.token_N
        layer.store.append(
            row_N,
            token_N + context.start,
            lasting_BT[row_N, token_N],
            made.key_NHD.detach(),
            made.value_NHD.detach(),
        )
    layer.store.advance(context.column_T.numel())

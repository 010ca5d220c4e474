"""A unit's own forward on its kept tokens, rows with equally many of them together.

For attentions that cannot be called on flat tokens (flat.py): those that do not go through
transformers' attention interface or are not plainly causal, attend to something else than what they
hand to their cache, or had their forward replaced (accelerate hooks), and families that were found
by their structure. They get the rows and columns of the model's own
mask that are left, and a cache that gives the keys to attend to. Keys of past tokens are copied
once a group.

Shapes: B batch, T tokens of this forward, N kept tokens, R rows of a group, L kept tokens of each,
H heads, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.cache import KeptKeys, RoutedCacheLayer, real_columns
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.keys import HandedCache, first_column, lasting, no_keys
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.visibility import additive, causal, recent, sliding_window_of
from router_tuning.units import Unit, first_of


@dataclass(frozen=True)
class RowsKeys:
    """Keys and values of rows (R, H, K, D), with the column of each, -1 at filling, and whether it
    is visible beyond the window (R, K).
    """

    key_RHKD: Tensor
    value_RHKD: Tensor
    column_RK: Tensor
    lasting_RK: Tensor

    def rows(self, row_R: Tensor) -> RowsKeys:
        """Some of the rows."""
        if len(row_R) == len(self.column_RK):
            return self
        parts = (self.key_RHKD, self.value_RHKD, self.column_RK, self.lasting_RK)
        return RowsKeys(*(part[row_R] for part in parts))

    def slots(self, of: Tensor | slice) -> RowsKeys:
        """Some of the keys of each row."""
        wide, flat = (self.key_RHKD, self.value_RHKD), (self.column_RK, self.lasting_RK)
        return RowsKeys(*(part[:, :, of] for part in wide), *(part[:, of] for part in flat))


def grouped_run(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    extra: MadeKeys | None,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
) -> tuple[Tensor, MadeKeys]:
    """What the unit gives for its kept tokens (N, D), and all the keys that were made."""
    kept = decided.kept
    past = _past(call, layer, unit, context)
    before = [*past, *_by_row(extra, decided, context)]
    ends_B = torch.tensor(kept.row_counts, device=kept.device).cumsum(0)
    outputs, keys, values, orders = [], [], [], []
    with _masks_taken(attention, context.decoder):
        for row_R, token_RL in _groups(kept):
            group = _Group(call, row_R, token_RL, before, attention, unit, context)
            outputs.append(group.output(dense_forward).flatten(0, 1))
            key, value = group.made()
            keys.append(key)
            values.append(value)
            first_R = ends_B[row_R] - token_RL.shape[1]
            slot_L = torch.arange(token_RL.shape[1], device=kept.device)
            orders.append((first_R[:, None] + slot_L).flatten())
    back_N = torch.cat(orders).argsort()
    output_ND, key_NHD, value_NHD = (torch.cat(x)[back_N] for x in (outputs, keys, values))
    return output_ND, MadeKeys(kept, key_NHD, value_NHD).joined(extra)


def _groups(kept: Places) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows with equally many kept tokens (R,), and these tokens (R, L)."""
    token_N = kept.there[1]
    count_B = torch.tensor(kept.row_counts)
    for count in sorted(set(kept.row_counts) - {0}):
        row_R = (count_B == count).nonzero()[:, 0]
        of_N = (count_B[kept.row_N] == count).to(kept.device)
        yield row_R.to(kept.device), token_N[of_N].view(len(row_R), count)


class _Group:
    """Rows with equally many kept tokens: one call of the unit's own forward."""

    def __init__(
        self,
        call: UnitCall,
        row_R: Tensor,
        token_RL: Tensor,
        before: list[RowsKeys],
        attention: nn.Module,
        unit: Unit,
        context: ForwardContext,
    ) -> None:
        self.call, self.context, self.unit, self.attention = call, context, unit, attention
        self.row_R, self.token_RL = row_R, token_RL
        self.before = [keys.rows(row_R) for keys in before]
        self.taken: tuple[Tensor, Tensor] | None = None

    def output(self, dense_forward: Callable[..., Any]) -> Tensor:
        """(R, L, D)."""
        cache = HandedCache(self.call.cache, self._attend_to)
        part = self.call.at(self._pick, self._mask(), cache)
        return first_of(part.run(dense_forward))

    def _pick(self, x_BT: Tensor) -> Tensor:
        """(B or 1, T, ...) -> (R, L, ...)."""
        row_RL = self.row_R[:, None].expand_as(self.token_RL)
        return x_BT[row_RL if len(x_BT) == len(self.call.x_BTD) else row_RL * 0, self.token_RL]

    def made(self) -> tuple[Tensor, Tensor]:
        """The keys and values that the forward made: (R * L, H, D) each."""
        if self.taken is None:
            raise no_keys(self.attention, self.unit)
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in self.taken)
        return key, value

    def _attend_to(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.taken = key, value
        keys = torch.cat([*(b.key_RHKD.to(key.dtype) for b in self.before), key], dim=2)
        values = torch.cat([*(b.value_RHKD.to(value.dtype) for b in self.before), value], dim=2)
        return keys, values

    def _mask(self) -> Tensor | None:
        """The model's own mask (R, h, L, K) for these queries and keys, without what the policy
        hides.
        """
        eager = self.attention.config._attn_implementation == "eager"  # type: ignore[union-attr]
        context, given = self.context, self.call.mask
        if not isinstance(given, Tensor) and context.sequence_BT is not None:
            raise UnsupportedCallError(
                "packed texts are told apart by a 4-D mask, which this attention implementation "
                'does not take; load the model with attn_implementation="sdpa" or "eager"'
            )
        if given is None and not self.before and not eager and context.real_BC is None:
            return None  # plainly causal over the same tokens
        query_RL = context.column_T[self.token_RL]
        column_RK = torch.cat([*(b.column_RK for b in self.before), query_RL], dim=1)
        own_RL = torch.ones_like(query_RL, dtype=torch.bool)
        lasting_RK = torch.cat([*(b.lasting_RK for b in self.before), own_RL], dim=1)
        first = first_column(self.call, self.unit, context)
        seen = (column_RK >= first)[:, None] & (
            lasting_RK[:, None] | recent(query_RL, column_RK, context.config.kv_window)
        )
        if not isinstance(given, Tensor) or given.ndim != 4:
            sliding = sliding_window_of(self.attention)
            mask = (seen & causal(query_RL, column_RK, sliding))[:, None]
            return additive(mask, self.call.x_BTD.dtype) if eager else mask
        picked = _pick_mask(given, self.row_R, self.token_RL, column_RK - first)
        if picked.dtype == torch.bool:
            return picked & seen[:, None]
        return picked.masked_fill(~seen[:, None], torch.finfo(picked.dtype).min)


def _pick_mask(mask: Tensor, row_R: Tensor, token_RL: Tensor, index_RK: Tensor) -> Tensor:
    """The rows, queries and keys of a mask (B or 1, h, T, C): (R, h, L, K)."""
    rows = row_R if mask.shape[0] > 1 else row_R * 0
    queries = mask[rows[:, None], :, token_RL].transpose(1, 2)  # (R, h, L, C)
    index = index_RK.clamp(0, mask.shape[-1] - 1)[:, None, None]
    return queries.gather(3, index.expand(*queries.shape[:3], -1))


def _past(
    call: UnitCall, layer: RoutedCacheLayer | None, unit: Unit, context: ForwardContext
) -> list[RowsKeys]:
    """The keys that earlier forwards have left."""
    if call.cache is None or not context.start:
        return []
    if context.config.kv == "kept":
        assert layer is not None
        assert layer.store is not None
        return _stored(layer.store)
    held = call.cache.layers[unit.layer_idx]
    length = min(held.keys.shape[2], context.start)  # a static layer has places to fill yet
    column_K = torch.arange(context.start - length, context.start, device=held.keys.device)
    column_BK = column_K.where(real_columns(context.real_BC, column_K, context.rows), -1)
    key, value = held.keys[:, :, :length], held.values[:, :, :length]
    return [RowsKeys(key, value, column_BK, torch.ones_like(column_BK, dtype=torch.bool))]


def _stored(store: KeptKeys) -> list[RowsKeys]:
    """The lasting keys of a cache, and those of skipped tokens that the next query may see."""
    view = store.view()
    if view is None:
        return []
    key, value, column_BS = view
    lasting_BS = store.lasting_S().expand(column_BS.shape)
    held = RowsKeys(key, value, column_BS.to(key.device), lasting_BS.to(key.device))
    # Of the skipped tokens no more than these are in a query's window.
    return [held.slots(slice(store.passing - store.window, None))]


def _by_row(extra: MadeKeys | None, decided: Decided, context: ForwardContext) -> list[RowsKeys]:
    """Keys of skipped tokens, each row's side by side."""
    if extra is None:
        return []
    places = extra.places
    row_N, token_N = places.row_N, places.token_N
    lasting_N = lasting(decided.host_BT, context)[row_N, token_N].to(places.device)
    return [
        RowsKeys(
            places.pack(extra.key_NHD).transpose(1, 2),
            places.pack(extra.value_NHD).transpose(1, 2),
            places.pack(context.column_T[places.there[1]], fill=-1),
            places.pack(lasting_N),
        )
    ]


@contextmanager
def _masks_taken(attention: Any, decoder: nn.Module) -> Iterator[None]:
    """Inside the block an attention takes 4-D masks: flash and flex implementations do not, and
    SDPA gives the same result, or eager where the model caps its scores or has sinks.
    """
    config = attention.config
    if config._attn_implementation in ("sdpa", "eager"):
        yield
        return
    attention.config = copy(config)
    attention.config._attn_implementation_internal = (
        "sdpa" if served_by_sdpa(attention, decoder) else "eager"
    )
    try:
        yield
    finally:
        attention.config = config


def served_by_sdpa(attention: nn.Module, decoder: nn.Module) -> bool:
    """Whether SDPA gives what a flash or flex function does: no capped scores, no sinks."""
    capped = getattr(attention, "attn_logit_softcapping", None) is not None
    return bool(getattr(decoder, "_supports_sdpa", False)) and not capped

"""The skipping path of any attention, and of blocks: the unit's own forward, on its kept tokens.

Whatever a unit is built of, it hands its new keys to a cache and gets all keys to attend to back.
So it is called with the kept tokens only, with a stand-in for the cache that keeps what the policy
names, and with the rows and columns of its mask that are left. Rows with equally many kept tokens
are called together, so that nothing is computed for filling. Keys of skipped tokens, where the
policy wants them, are made before (see `_keys_of`).

Shapes: B batch, T tokens of this forward, N gathered tokens, R rows of a group, L kept tokens of
each, H heads, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError, UnsupportedModelError
from router_tuning.execution.cache import KeptKeys, RoutedCacheLayer, real_columns
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.projections import keys_values
from router_tuning.execution.tokens import Gathered, put_in_place, written
from router_tuning.execution.visibility import (
    additive,
    causal,
    permanent,
    recent,
    sliding_window_of,
)
from router_tuning.units import (
    Unit,
    decoder_layers,
    family_of,
    first_of,
    input_norm_of,
)


@dataclass(frozen=True)
class FlatKeys:
    """Keys and values of some tokens: (N, H, D) each."""

    tokens: Gathered
    key_NHD: Tensor
    value_NHD: Tensor


@dataclass(frozen=True)
class RowKeys:
    """Keys and values of rows (R, H, K, D), with the column of each, -1 at filling, and whether it
    is visible beyond the window (R, K).
    """

    key_RHKD: Tensor
    value_RHKD: Tensor
    column_RK: Tensor
    permanent_RK: Tensor

    def rows(self, row_R: Tensor) -> RowKeys:
        """Some of the rows."""
        if len(row_R) == len(self.column_RK):
            return self
        parts = (self.key_RHKD, self.value_RHKD, self.column_RK, self.permanent_RK)
        return RowKeys(*(part[row_R] for part in parts))

    def slots(self, of: Tensor | slice) -> RowKeys:
        """Some of the keys of each row."""
        wide, flat = (self.key_RHKD, self.value_RHKD), (self.column_RK, self.permanent_RK)
        return RowKeys(*(part[:, :, of] for part in wide), *(part[:, of] for part in flat))


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


def gathered_call(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
    skipped_BTD: Tensor,
) -> Tensor:
    """What a unit gives (B, T, D): at its kept tokens what its own forward does, at the others what
    is given for skipped ones. The attention is the unit's own, or the unit itself.
    """
    keep_BT = decided.keep_BT
    num_kept = int(keep_BT.sum())
    if num_kept == context.num_real and (layer is None or layer.store is None):
        context.note(unit, decided.record(context.real_BT, context))
        return first_of(call.run(dense_forward))
    write_BT = written(keep_BT, num_kept, call, context)
    context.note(unit, decided.record(write_BT, context))
    if context.config.kv == "kept" and layer is not None:
        window, device = context.config.kv_window, keep_BT.device
        layer.begin_skipping(context.rows, window, context.real_BC, device)
    past = _past(call, layer, unit, context)
    output = skipped_BTD.clone()
    with _masks_taken(attention, context.decoder):
        extra = _keys_of(dense_forward, attention, call, write_BT & ~keep_BT, unit, context)
        made = [] if extra is None else [extra]
        before = [*past, *_by_row(extra, context)]
        for row_R, token_RL in _groups(keep_BT):
            group = _Group(call, row_R, token_RL, before, attention, unit, context)
            output[row_R[:, None], token_RL] = group.output(dense_forward).to(output.dtype)
            made.append(group.made())
    if call.cache is not None:
        _store(made, call, layer, keep_BT, unit, context)
    return output


def _groups(keep_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows with equally many kept tokens (R,), and these tokens (R, L)."""
    count_B = keep_BT.sum(1)
    for count in sorted(set(count_B.tolist()) - {0}):
        row_R = (count_B == count).nonzero()[:, 0]
        yield row_R, keep_BT[row_R].nonzero()[:, 1].view(len(row_R), count)


class _Group:
    """Rows with equally many kept tokens: one call of the unit's own forward."""

    def __init__(
        self,
        call: UnitCall,
        row_R: Tensor,
        token_RL: Tensor,
        before: list[RowKeys],
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
        row_RL = self.row_R[:, None].expand_as(self.token_RL)
        cache = HandedCache(self.call.cache, self._attend_to)
        part = self.call.at(row_RL, self.token_RL, self._mask(), cache)
        return first_of(part.run(dense_forward))

    def made(self) -> FlatKeys:
        """The keys that the forward made."""
        if self.taken is None:
            raise UnsupportedModelError(_no_keys(self.attention, self.unit))
        row_RL = self.row_R[:, None].expand_as(self.token_RL)
        slot_RL = torch.arange(row_RL.shape[1], device=row_RL.device).expand_as(row_RL)
        tokens = Gathered(
            row_RL.flatten(),
            self.token_RL.flatten(),
            slot_RL.flatten(),
            (row_RL.shape[0], row_RL.shape[1]),
        )
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in self.taken)
        return FlatKeys(tokens, key, value)

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
        permanent_RK = torch.cat([*(b.permanent_RK for b in self.before), own_RL], dim=1)
        first = _first_column(self.call, self.unit, context)
        seen = (column_RK >= first)[:, None] & (
            permanent_RK[:, None] | recent(query_RL, column_RK, context.config.kv_window)
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


def _first_column(call: UnitCall, unit: Unit, context: ForwardContext) -> int:
    """The column that a mask of this forward begins with: keys before it are out of sight."""
    if call.cache is None:
        return 0
    return int(call.cache.get_mask_sizes(context.column_T.numel(), unit.layer_idx)[1])


def _past(
    call: UnitCall, layer: RoutedCacheLayer | None, unit: Unit, context: ForwardContext
) -> list[RowKeys]:
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
    return [RowKeys(key, value, column_BK, torch.ones_like(column_BK, dtype=torch.bool))]


def _stored(store: KeptKeys) -> list[RowKeys]:
    """The lasting keys of a cache, and of its ring the slots that the next query may see."""
    view = store.view()
    if view is None:
        return []
    held = RowKeys(*view, store.permanent_S().expand(view[2].shape))
    if not store.ring:
        return [held]
    first = max(store.seen - store.window + 1, 0)
    slot_K = torch.arange(first, store.seen, device=view[2].device) % store.ring
    return [held.slots(slot_K), held.slots(slice(store.ring, None))]


def _by_row(extra: FlatKeys | None, context: ForwardContext) -> list[RowKeys]:
    """Keys of skipped tokens, each row's side by side."""
    if extra is None:
        return []
    lasting_BT = _lasting(context)
    tokens = extra.tokens
    return [
        RowKeys(
            tokens.pack(extra.key_NHD).transpose(1, 2),
            tokens.pack(extra.value_NHD).transpose(1, 2),
            tokens.pack(context.column_T[tokens.token_N], fill=-1),
            tokens.pack(lasting_BT[tokens.row_N, tokens.token_N]),
        )
    ]


def _lasting(context: ForwardContext) -> Tensor:
    """Tokens whose keys stay visible though they are skipped: (B, T)."""
    nothing_BT = torch.zeros_like(context.real_BT)
    return ~nothing_BT if context.config.kv == "all" else permanent(nothing_BT, context)


def _keys_of(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    mask_BT: Tensor,
    unit: Unit,
    context: ForwardContext,
) -> FlatKeys | None:
    """Keys and values of the tokens where the mask is True; None if there are none.

    An attention of known parts makes just these; of any other, and of what stands before it in a
    block, the forward runs up to the point where it hands them over.
    """
    tokens = Gathered.where(mask_BT)
    row_N, token_N = tokens.row_N, tokens.token_N
    if not len(row_N):
        return None
    if family_of(context.decoder).parts:
        x_ND = call.x_BTD[row_N, token_N]
        norm = input_norm_of(context.decoder, decoder_layers(context.decoder)[unit.layer_idx])
        if unit.kind == "block" and norm is not None:
            x_ND = norm(x_ND)
        rope = (tokens.pick(call.rope[0]), tokens.pick(call.rope[1]))
        return FlatKeys(tokens, *keys_values(attention, x_ND, rope))
    taken: list[Tensor] = []

    def take(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        taken.extend(x[0].transpose(0, 1) for x in (key, value))
        raise _KeysTaken

    try:
        call.at(row_N[None], token_N[None], None, HandedCache(call.cache, take)).run(dense_forward)
    except _KeysTaken:
        return FlatKeys(tokens, *taken)
    raise UnsupportedModelError(_no_keys(attention, unit))


def _no_keys(attention: nn.Module, unit: Unit) -> str:
    return (
        f"{type(attention).__name__} of {unit.name} handed no keys to its cache, so what it "
        "attends to is not known; leave its layer out of `layers`"
    )


def _store(
    made: list[FlatKeys],
    call: UnitCall,
    layer: RoutedCacheLayer | None,
    keep_BT: Tensor,
    unit: Unit,
    context: ForwardContext,
) -> None:
    """Put the new keys into the cache."""
    row_N, token_N = (
        torch.cat([getattr(keys.tokens, name) for keys in made] or [keep_BT.new_zeros(0).long()])
        for name in ("row_N", "token_N")
    )
    if context.config.kv == "all":
        key, value = (put_in_place(x, row_N, token_N, context) for x in _joined(made))
        call.cache.update(key.transpose(1, 2), value.transpose(1, 2), unit.layer_idx)
        return
    assert layer is not None
    assert layer.store is not None
    if made:
        order_N = (row_N * context.column_T.numel() + token_N).argsort()
        row_N, token_N = row_N[order_N], token_N[order_N]
        key_NHD, value_NHD = (x[order_N] for x in _joined(made))
        lasting_N = (keep_BT | _lasting(context))[row_N, token_N]
        layer.store.append(row_N, context.column_T[token_N], lasting_N, key_NHD, value_NHD)
    layer.store.advance(context.column_T.numel())


def _joined(made: list[FlatKeys]) -> tuple[Tensor, Tensor]:
    keys, values = ([getattr(m, name).detach() for m in made] for name in ("key_NHD", "value_NHD"))
    return torch.cat(keys), torch.cat(values)


@contextmanager
def _masks_taken(attention: Any, decoder: nn.Module) -> Iterator[None]:
    """Inside the block an attention takes 4-D masks: flash and flex implementations do not, and
    SDPA gives the same result, or eager where the model caps its scores or has sinks.
    """
    config = attention.config
    if config._attn_implementation in ("sdpa", "eager"):
        yield
        return
    capped = getattr(attention, "attn_logit_softcapping", None) is not None
    plain = getattr(decoder, "_supports_sdpa", False) and not capped
    attention.config = copy(config)
    attention.config._attn_implementation_internal = "sdpa" if plain else "eager"
    try:
        yield
    finally:
        attention.config = config

"""The skipping path of an attention whose parts are known: only kept tokens are queried, only the
policy's keys are made and cached.

Kept tokens of all rows are gathered into one flat list for the projections, and packed into a
rectangle (rows x longest row) for the attention itself. There is no loop over tokens or rows.

Shapes: B batch, T tokens of this forward, N gathered tokens, H heads, K keys, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.execution.cache import KeptKeys, RoutedCacheLayer, real_columns
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.projections import attend, keys_values, queries
from router_tuning.execution.visibility import causal, permanent, recent, sliding_window_of
from router_tuning.units import Unit


@dataclass(frozen=True)
class Gathered:
    """Some tokens of a forward, in order of row and column, and their places in a packed
    rectangle.
    """

    row_N: Tensor
    token_N: Tensor
    slot_N: Tensor
    size: tuple[int, int]
    """Rows and longest row of the rectangle."""

    @classmethod
    def where(cls, mask_BT: Tensor) -> Gathered:
        """The tokens where the mask is True."""
        row_N, token_N = mask_BT.nonzero(as_tuple=True)
        slot_BT = mask_BT.long().cumsum(1) - 1
        slot_N = slot_BT[row_N, token_N]
        longest = int(slot_N.max()) + 1 if slot_N.numel() else 0
        return cls(row_N, token_N, slot_N, (mask_BT.shape[0], longest))

    def pick(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...); a first dimension of 1 stands for all rows."""
        return x_BT[
            self.row_N if x_BT.shape[0] == self.size[0] else torch.zeros_like(self.row_N),
            self.token_N,
        ]

    def pack(self, x_N: Tensor, fill: float = 0) -> Tensor:
        """(N, ...) -> (B, longest, ...), `fill` behind the end of the shorter rows."""
        if x_N.shape[0] == self.size[0] * self.size[1]:
            return x_N.unflatten(0, self.size)
        out = x_N.new_full((*self.size, *x_N.shape[1:]), fill)
        out[self.row_N, self.slot_N] = x_N
        return out

    def unpack(self, x_BL: Tensor) -> Tensor:
        """(B, longest, ...) -> (N, ...)."""
        return x_BL[self.row_N, self.slot_N]


@dataclass(frozen=True)
class Keys:
    """Keys and values to attend to, with the column of each and whether it is visible beyond the
    window.
    """

    key_BHKD: Tensor
    value_BHKD: Tensor
    column_BK: Tensor
    permanent_BK: Tensor | None = None
    """None where all are."""
    tokens: Gathered | None = None
    """The tokens of this forward that they belong to; None where the cache holds others."""


def skipping_attention(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    layer: RoutedCacheLayer | None,
    unit: Unit,
    context: ForwardContext,
) -> tuple[Tensor, Any]:
    """The attention's output (B, T, D), zero at skipped tokens, computed for kept tokens only."""
    keep_BT = decided.keep_BT
    num_kept = int(keep_BT.sum())
    if num_kept == context.num_real and (layer is None or layer.store is None):
        context.note(unit, decided.record(context.real_BT, context))
        return call.run(dense_forward)
    write_BT = written(keep_BT, num_kept, call, context)
    context.note(unit, decided.record(write_BT, context))
    asked = Gathered.where(keep_BT)
    writing = asked if write_BT is keep_BT else Gathered.where(write_BT)
    if context.config.kv == "kept":
        keys = _kept_keys(attention, call, writing, permanent(keep_BT, context), layer, context)
    else:
        keys = _all_keys(attention, call, writing, context)
    output = call.x_BTD.new_zeros(call.x_BTD.shape)
    if num_kept:
        attended_ND = _attend(attention, call, asked, keys, context)
        output[asked.row_N, asked.token_N] = attended_ND.to(output.dtype)  # autocast changes it
    return output, None


def written(keep_BT: Tensor, num_kept: int, call: UnitCall, context: ForwardContext) -> Tensor:
    """Tokens whose key and value are computed: (B, T)."""
    if call.cache is None and not num_kept:
        return torch.zeros_like(keep_BT)  # nobody will ever ask for them
    if context.config.kv == "all" or context.config.kv_window:
        return context.real_BT
    return permanent(keep_BT, context)


def _attend(
    attention: Any, call: UnitCall, asked: Gathered, keys: Keys, context: ForwardContext
) -> Tensor:
    """Outputs of the asking tokens: (N, D)."""
    query_NHD = queries(attention, asked.pick(call.x_BTD), _rope(call, asked))
    query_BHQD = asked.pack(query_NHD).transpose(1, 2)
    column_BQ = asked.pack(context.column_T[asked.token_N], fill=-1)
    mask = _mask(attention, asked, column_BQ, keys, context)
    output_BQHD = attend(attention, query_BHQD, keys.key_BHKD, keys.value_BHKD, mask)
    output: Tensor = attention.o_proj(asked.unpack(output_BQHD).flatten(1))
    return output


def _mask(
    attention: Any, asked: Gathered, column_BQ: Tensor, keys: Keys, context: ForwardContext
) -> Tensor | None:
    """Which key each query sees: (B, 1, Q, K); None where that is plainly causal over the same
    tokens.
    """
    sliding = sliding_window_of(attention)
    fits = sliding is None or context.start + context.column_T.numel() <= sliding
    if keys.tokens is asked and keys.permanent_BK is None and context.sequence_BT is None and fits:
        return None
    mask_BQK = causal(column_BQ, keys.column_BK, sliding)
    if keys.permanent_BK is not None:
        near_BQK = recent(column_BQ, keys.column_BK, context.config.kv_window)
        mask_BQK = mask_BQK & (keys.permanent_BK[:, None, :] | near_BQK)
    if context.sequence_BT is not None and keys.tokens is not None:
        asking_BQ, asked_BK = (
            g.pack(g.pick(context.sequence_BT), fill=-1) for g in (asked, keys.tokens)
        )
        mask_BQK = mask_BQK & (asking_BQ[:, :, None] == asked_BK[:, None, :])
    return mask_BQK[:, None]


def _rope(call: UnitCall, tokens: Gathered) -> tuple[Tensor, Tensor]:
    return tokens.pick(call.rope[0]), tokens.pick(call.rope[1])


def _all_keys(
    attention: nn.Module, call: UnitCall, written: Gathered, context: ForwardContext
) -> Keys:
    """kv="all": every real token's key, through the ordinary cache."""
    flat = keys_values(attention, written.pick(call.x_BTD), _rope(call, written))
    key, value = (_in_place(x_NHD, written, context).transpose(1, 2) for x_NHD in flat)
    if call.cache is None:
        column_BK = context.column_T.where(context.real_BT, -1)
        return Keys(key, value, column_BK, tokens=_every_token(context))
    length = context.column_T.numel()
    first = int(call.cache.get_mask_sizes(length, attention.layer_idx)[1])
    end = context.start + length
    # A static layer gives back places that are not filled yet, too.
    key, value = (
        x_BHKD[:, :, : end - first] for x_BHKD in call.cache.update(key, value, attention.layer_idx)
    )
    column_K = torch.arange(first, end, device=key.device)
    column_BK = column_K.where(real_columns(context.real_BC, column_K, context.rows), -1)
    return Keys(key, value, column_BK)


def _in_place(x_NHD: Tensor, written: Gathered, context: ForwardContext) -> Tensor:
    """(N, H, D) -> (B, T, H, D), zero at padding."""
    if x_NHD.shape[0] == context.real_BT.numel():  # in order, so there is nothing to move
        return x_NHD.unflatten(0, tuple(context.real_BT.shape))
    return put_in_place(x_NHD, written.row_N, written.token_N, context)


def put_in_place(x_NHD: Tensor, row_N: Tensor, token_N: Tensor, context: ForwardContext) -> Tensor:
    """(N, H, D), in any order -> (B, T, H, D), zero where there is none."""
    out = x_NHD.new_zeros((*context.real_BT.shape, *x_NHD.shape[1:]))
    out[row_N, token_N] = x_NHD
    return out


def _every_token(context: ForwardContext) -> Gathered:
    return Gathered.where(torch.ones_like(context.real_BT))


def _kept_keys(
    attention: nn.Module,
    call: UnitCall,
    written: Gathered,
    permanent_BT: Tensor,
    layer: RoutedCacheLayer | None,
    context: ForwardContext,
) -> Keys:
    """kv="kept": the written tokens' keys together with those in the cache, which takes the new
    ones in.
    """
    key_NHD, value_NHD = keys_values(attention, written.pick(call.x_BTD), _rope(call, written))
    permanent_N = permanent_BT[written.row_N, written.token_N]
    if layer is None:
        return _packed_keys(key_NHD, value_NHD, permanent_N, written, context)
    window = context.config.kv_window
    store = layer.begin_skipping(context.rows, window, context.real_BC, key_NHD.device)
    column_N = context.column_T[written.token_N]
    arguments = (written.row_N, column_N, permanent_N, key_NHD.detach(), value_NHD.detach())
    # One token a row is written first and attends to the cache in place; its ring slot had expired.
    if context.column_T.numel() == 1:
        store.append(*arguments)
        store.advance(1)
        return _stored_keys(store)
    new = _packed_keys(key_NHD, value_NHD, permanent_N, written, context)
    keys = _joined(_stored_keys(store), new) if store.seen else new
    store.append(*arguments)
    store.advance(context.column_T.numel())
    return keys


def _packed_keys(
    key_NHD: Tensor,
    value_NHD: Tensor,
    permanent_N: Tensor,
    written: Gathered,
    context: ForwardContext,
) -> Keys:
    return Keys(
        written.pack(key_NHD).transpose(1, 2),
        written.pack(value_NHD).transpose(1, 2),
        written.pack(context.column_T[written.token_N], fill=-1),
        written.pack(permanent_N) if context.config.kv_window else None,
        written,
    )


def _stored_keys(store: KeptKeys) -> Keys:
    view = store.view()
    assert view is not None
    key, value, column_BK = view
    permanent = store.permanent_S().expand(column_BK.shape) if store.window else None
    return Keys(key, value, column_BK, permanent)


def _joined(past: Keys, new: Keys) -> Keys:
    permanent = None
    if past.permanent_BK is not None and new.permanent_BK is not None:
        permanent = torch.cat([past.permanent_BK, new.permanent_BK], dim=1)
    return Keys(
        torch.cat([past.key_BHKD, new.key_BHKD], dim=2),
        torch.cat([past.value_BHKD, new.value_BHKD], dim=2),
        torch.cat([past.column_BK, new.column_BK], dim=1),
        permanent,
    )

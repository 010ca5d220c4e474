"""A unit's own forward on the kept tokens of all rows, put side by side as one flat row.

Whatever a unit is built of, it hands its new keys to a cache, and attends through transformers'
attention interface. So it is called with a stand-in for the cache and one for the attention
function: each row's queries then attend to that row's keys alone, in place (rows.py). Nothing is
computed for filling, and no key in the cache is moved.

Shapes: B batch, T tokens of this forward, N kept tokens, S segments (rows, or packed texts), H
heads, G key heads, D head dimension.
"""

from __future__ import annotations

import contextvars
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from router_tuning.errors import UnsupportedModelError
from router_tuning.execution.cache import KeptKeys, RoutedCacheLayer, real_columns
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.grouped import served_by_sdpa
from router_tuning.execution.keys import (
    HandedCache,
    first_column,
    lasting,
    no_keys,
    store_all,
    store_kept,
)
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.rows import Kernel, Reach, RowKeys, attend
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.units import Unit, first_of, is_found

IMPLEMENTATION = "router_tuning_rows"
"""The name of our attention function in transformers' interface."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What the forward of an attention that goes through the interface mentions."""

_expanding: set[type] = set()
"""Attentions that turned out to attend to something else than the keys they hand to their cache,
though their family does not say so.
"""
_running: contextvars.ContextVar[FlatRun | None] = contextvars.ContextVar(
    "router_tuning_rows", default=None
)


class _NotHanded(Exception):
    """The keys to attend to are not those that were handed to the cache."""


def can_run_flat(attention: nn.Module, context: ForwardContext) -> bool:
    """Whether an attention can be called on flat tokens: through the interface, under a mask that
    follows from the columns. Of a family found by its structure this is not known.
    """
    kind = type(attention)
    return (
        kind not in _expanding
        and not context.family.expands_keys
        and not is_found(context.decoder)
        and attention.__dict__.get("dense_forward") is None
        and getattr(attention, "is_causal", False) is True
        and _through_interface(kind)
    )


_known: dict[type, bool] = {}


def _through_interface(kind: type) -> bool:
    if kind not in _known:
        code = inspect.unwrap(kind.forward).__code__  # type: ignore[attr-defined]
        _known[kind] = INTERFACE in code.co_names
    return _known[kind]


class FlatRun:
    """One call of a unit on the kept tokens of all rows."""

    def __init__(
        self,
        attention: nn.Module,
        call: UnitCall,
        decided: Decided,
        extra: MadeKeys | None,
        layer: RoutedCacheLayer | None,
        unit: Unit,
        context: ForwardContext,
    ) -> None:
        self.attention, self.call, self.decided, self.extra = attention, call, decided, extra
        self.layer, self.unit, self.context = layer, unit, context
        self.kept: Places = decided.kept
        self.handed: Tensor | None = None
        self.attended = False

    def output(self, dense_forward: Callable[..., Any]) -> Tensor | None:
        """What the unit gives for its kept tokens (N, D); None where it cannot be called so, and
        nothing has happened.
        """
        try:
            with _put_in(self):
                forward = dense_forward
                if self.unit.kind == "attn":
                    forward = own_forward(self.attention, dense_forward)
                output = first_of(self._part().run(forward))
        except _NotHanded:
            _expanding.add(type(self.attention))
            return None
        if not self.attended:
            raise no_keys(self.attention, self.unit)
        flat: Tensor = output[0]
        return flat

    def _part(self) -> UnitCall:
        """The call on the kept tokens only."""
        cache = HandedCache(self.call.cache, self._take)
        rows, tokens = self.kept.size
        if rows == 1 and len(self.kept) == tokens:
            return self.call.over(cache, {**self.call.kwargs, "attention_mask": None})
        row_N, token_N = self.kept.there
        return self.call.at(row_N[None], token_N[None], None, cache)

    def _take(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.handed = key
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """Stands for the attention function: (1, H, N, D) -> (1, N, H, D)."""
        if key is not self.handed or kwargs.get("position_bias") is not None:
            raise _NotHanded
        self.attended = True
        kernel = Kernel(self._eager(), self.attention, kwargs)
        made = MadeKeys(self.kept, key[0].transpose(0, 1), value[0].transpose(0, 1))
        keys = _Keys(made.joined(self.extra), self)
        together = keys.together()
        if together is not None:
            output = kernel(query.transpose(0, 2), together.key, together.value, None)
            return output.transpose(0, 1), None
        reach = Reach(self.context.config.kv_window, self.sliding)
        column_N = self.kept.token_N + self.context.start
        parts, begin = [], 0
        for segment, number in enumerate(keys.asked_S):
            some = slice(begin, begin := begin + number)
            if number:
                of = keys.of(segment)
                parts.append(attend(kernel, query[:, :, some], column_N[some], of, reach))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None

    @cached_property
    def sliding(self) -> int | None:
        """How many latest columns the attention sees by the model's own design."""
        return sliding_window_of(self.attention)

    def _eager(self) -> Callable[..., Any] | None:
        """The family's own attention function, where SDPA does not serve: its scores are capped, or
        it has sinks, or it was asked for. Flash and flex functions are served by either.
        """
        asked = self.attention.config._attn_implementation  # type: ignore[union-attr]
        if asked == "sdpa":
            return None
        if asked != "eager" and served_by_sdpa(self.attention, self.context.decoder):
            return None
        module = sys.modules[type(self.attention).__module__]
        function: Callable[..., Any] = module.eager_attention_forward
        return function


class _Keys:
    """The keys of each segment, after the new ones were put into the cache."""

    def __init__(self, made: MadeKeys, run: FlatRun) -> None:
        context, call = run.context, run.call
        self.made, self.run, self.context = made, run, context
        self.lasting_BT = lasting(run.decided.host_BT, context)
        self.asked_S = _by_segment(run.kept, context)
        self.one = context.column_T.numel() == 1
        self.of: Callable[[int], RowKeys] = self._made
        if call.cache is None:
            return
        if context.config.kv == "all":
            self.first = first_column(call, run.unit, context)
            self.cached = store_all(made, call, run.unit, context)
            self.of = self._cached
            return
        assert run.layer is not None
        store = run.layer.store
        assert store is not None
        self.store: KeptKeys = store
        fresh = not store.seen
        if store.ring and not self.one and not fresh:
            # A long chunk overwrites ring slots that its first queries see.
            before = [self._joined(row) for row in range(context.rows)]
            self.of = before.__getitem__
        elif self.one or not fresh:
            self.of = self._stored
        store_kept(made, self.lasting_BT, run.layer, context)

    def together(self) -> RowKeys | None:
        """Keys of all rows (B, G, K, D), where each has one query that sees all, equally many."""
        if not self.one or self.run.call.cache is None or min(self.asked_S) == 0:
            return None
        keys = [self.of(row) for row in range(len(self.asked_S))]
        if any(k.column_K is not None or k.key.shape != keys[0].key.shape for k in keys):
            return None
        key, value = (
            self.cached if self.of == self._cached else (self.store.keys, self.store.values)
        )
        assert key is not None
        assert value is not None
        number = keys[0].key.shape[2]
        return RowKeys(key[:, :, :number], value[:, :, :number])

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Where each segment's made keys begin and end."""
        ends = torch.tensor(_by_segment(self.made.places, self.context)).cumsum(0).tolist()
        return list(zip([0, *ends], ends, strict=False))

    def _fits(self, columns: int) -> bool:
        return self.run.sliding is None or columns <= self.run.sliding

    def _made(self, segment: int) -> RowKeys:
        """Of this forward alone."""
        begin, end = self._bounds[segment]
        key, value = (
            x[begin:end].transpose(0, 1)[None] for x in (self.made.key_NHD, self.made.value_NHD)
        )
        same = end - begin == self.asked_S[segment]
        if same and self._fits(self.context.column_T.numel()):
            return RowKeys(key, value)
        row_N, token_N = (x[begin:end] for x in (self.made.places.row_N, self.made.places.token_N))
        lasting_N = None
        if self.context.config.kv == "kept" and self.context.config.kv_window:
            lasting_N = self.lasting_BT[row_N, token_N]
        return RowKeys(key, value, token_N + self.context.start, lasting_N)

    def _cached(self, row: int) -> RowKeys:
        """kv="all": of the ordinary cache."""
        context = self.context
        key, value = (x[row : row + 1] for x in self.cached)
        number, length = key.shape[2], context.column_T.numel()
        fits, padded = self._fits(number), context.real_BC is not None
        whole = self.asked_S[row] == length and length in (1, number)
        if fits and whole and not padded:
            return RowKeys(key, value)
        column_K = torch.arange(self.first, self.first + number)
        if padded:
            column_K = column_K.where(
                real_columns(context.host_real_BC, column_K, context.rows)[row], -1
            )
            real_K = (column_K >= 0).nonzero()[:, 0]
            if fits and len(real_K) == self.asked_S[row] == int(real_K[-1] - real_K[0]) + 1:
                some = slice(int(real_K[0]), int(real_K[-1]) + 1)
                return RowKeys(key[:, :, some], value[:, :, some])
        return RowKeys(key, value, column_K)

    def _stored(self, row: int) -> RowKeys:
        """kv="kept": of the store, the new ones included."""
        store = self.store
        assert store.keys is not None
        assert store.values is not None
        used = store.ring + store.lengths[row]
        key, value = (x[row : row + 1, :, :used] for x in (store.keys, store.values))
        if self.one and not store.ring and self._fits(store.seen):
            return RowKeys(key, value)
        lasting_K = torch.arange(used) >= store.ring if store.ring else None
        return RowKeys(key, value, store.columns_BS[row, :used].clone(), lasting_K)

    def _joined(self, row: int) -> RowKeys:
        """The store's keys and the new ones, before these are stored."""
        past, new = self._stored(row), self._made(row)
        begin, end = self._bounds[row]
        row_N, token_N = (x[begin:end] for x in (self.made.places.row_N, self.made.places.token_N))
        assert past.column_K is not None
        assert past.lasting_K is not None
        return RowKeys(
            torch.cat([past.key, new.key.to(past.key.dtype)], dim=2),
            torch.cat([past.value, new.value.to(past.value.dtype)], dim=2),
            torch.cat([past.column_K, token_N + self.context.start]),
            torch.cat([past.lasting_K, self.lasting_BT[row_N, token_N]]),
        )


def _by_segment(places: Places, context: ForwardContext) -> list[int]:
    """How many of the tokens each segment has, in their order."""
    sequence_BT = context.host_sequence_BT
    if sequence_BT is None:
        return places.row_counts
    per_row = int(sequence_BT.max()) + 1
    segment_N = places.row_N * per_row + sequence_BT[places.row_N, places.token_N]
    counts: list[int] = torch.bincount(segment_N, minlength=context.rows * per_row).tolist()
    return counts


class _Seen:
    """An object as its own method sees it, but for some of its attributes."""

    def __init__(self, seen: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


@contextmanager
def _put_in(run: FlatRun) -> Iterator[None]:
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)


def own_forward(attention: nn.Module, dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The attention's forward, attending by rows where a flat call of it, or of the block around
    it, runs.
    """
    run = _running.get()
    if run is None or run.attention is not attention:
        return dense_forward
    config = _Seen(attention.config, _attn_implementation=IMPLEMENTATION)
    seen = _Seen(attention, config=config)
    forward: Callable[..., Any] = type(attention).forward
    return lambda *args, **kwargs: forward(seen, *args, **kwargs)


def _by_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Our attention function, in the form of transformers' interface."""
    run = _running.get()
    if run is None:
        raise UnsupportedModelError(f"{IMPLEMENTATION} serves skipping alone; use sdpa or eager")
    return run.attend(query, key, value, kwargs)


AttentionInterface.register(IMPLEMENTATION, _by_rows)

"""Which keys each row's kept tokens attend to, and where these lie: in the cache, or just made.

A segment is a row, or one packed text of a row.

Shapes: B batch, T tokens of this forward, N chosen tokens, S segments, G key heads, K keys of one
row, D head dimension.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from router_tuning.execution.cache import KeptKeys, RoutedCacheLayer, real_columns
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.keys import lasting, store_all, store_kept
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.rows import RowKeys
from router_tuning.units import Unit


class SegmentKeys:
    """The keys of each segment, after the new ones were put into the cache."""

    def __init__(
        self,
        made: MadeKeys,
        decided: Decided,
        call: UnitCall,
        layer: RoutedCacheLayer | None,
        unit: Unit,
        sliding: int | None,
        context: ForwardContext,
    ) -> None:
        self.made, self.sliding, self.context = made, sliding, context
        self.lasting_BT = lasting(decided.host_BT, context)
        self.asked_S = _by_segment(decided.kept, context)
        self.one = call.cache is not None and context.column_T.numel() == 1
        self.store: KeptKeys | None = None
        self.cached: tuple[Tensor, Tensor] | None = None
        self.before: list[RowKeys] | None = None
        if call.cache is None:
            return
        if context.config.kv == "all":
            key, value, self.first = store_all(made, call, unit, context)
            self.cached = key, value
            return
        assert layer is not None
        assert layer.store is not None
        self.fresh = not layer.store.seen
        self.store = layer.store
        if self.store.passing and not self.one and not self.fresh:
            # A long chunk moves keys out of sight that its first queries see.
            self.before = [self._joined(row) for row in range(context.rows)]
        store_kept(made, self.lasting_BT, layer, context)

    def of(self, segment: int) -> RowKeys:
        """The keys of a segment. A method, not one of its choices kept: an object that holds its
        own method holds its tensors until Python looks for cycles, some layers later.
        """
        if self.cached is not None:
            return self._cached(segment)
        if self.before is not None:
            return self.before[segment]
        if self._from_store:
            return self._stored(segment)
        return self._made(segment)

    @property
    def _from_store(self) -> bool:
        return self.store is not None and self.before is None and (self.one or not self.fresh)

    def together(self) -> RowKeys | None:
        """Keys of all rows (B, G, K, D), where each has one query that sees all, equally many.

        With kv="all" this does not come up: where all rows ask, the dense call itself runs.
        """
        if not self.one or not self._from_store or min(self.asked_S) == 0:
            return None
        store = self.store
        assert store is not None
        assert store.keys is not None
        assert store.values is not None
        some, *others = self._latest
        if not self._fits(store.seen) or any(other != some for other in others):
            return None
        return RowKeys(store.keys[:, :, some], store.values[:, :, some])

    @cached_property
    def _latest(self) -> list[slice]:
        """The slots that the one new token of each row sees."""
        assert self.store is not None
        return self.store.latest()

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Where each segment's made keys begin and end."""
        ends = torch.tensor(_by_segment(self.made.places, self.context)).cumsum(0).tolist()
        return list(zip([0, *ends], ends, strict=False))

    def _fits(self, columns: int) -> bool:
        return self.sliding is None or columns <= self.sliding

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
        assert self.cached is not None
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
            begin, end = int(real_K[0]), int(real_K[-1]) + 1
            if end - begin == len(real_K):  # padding at the ends only
                some = slice(begin, end)
                key, value, column_K = key[:, :, some], value[:, :, some], column_K[some]
                if fits and self.asked_S[row] == len(real_K):
                    return RowKeys(key, value)
        return RowKeys(key, value, column_K)

    def _stored(self, row: int) -> RowKeys:
        """kv="kept": of the store, the new ones included; of the skipped ones at least those that
        the first query sees.
        """
        store = self.store
        assert store is not None
        assert store.keys is not None
        assert store.values is not None
        fits = self.one and self._fits(store.seen)
        some = (
            self._latest[row]
            if fits
            else slice(store.passing - store.window, store.passing + store.lengths[row])
        )
        key, value = (x[row : row + 1, :, some] for x in (store.keys, store.values))
        if fits:
            return RowKeys(key, value)
        lasting_K = torch.arange(some.start, some.stop) >= store.passing if store.window else None
        return RowKeys(key, value, store.columns_BS[row, some], lasting_K)

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
